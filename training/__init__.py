"""The laboratory: state in, state out; effects only at its edge."""

from typing import TYPE_CHECKING, Any

import tiny_onn_func  # noqa: F401  before torch: it bounds how long OpenMP's threads spin
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, hyper_step, init_state, state_of
from training.step.main_pass import per_token_surprise
from training.step.metrics import Metrics
from training.step.rules import Rule, Targets

if TYPE_CHECKING:
    from training.study.runner import run_study

__all__ = [
    "Batch",
    "HyperParams",
    "Metrics",
    "Rule",
    "SurpriseHookManager",
    "Targets",
    "TrainState",
    "hyper_step",
    "init_state",
    "per_token_surprise",
    "run_study",
    "state_of",
]


def __getattr__(name: str) -> Any:
    """Import the study engine, with all its files and pictures, when it is first asked for."""
    if name != "run_study":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training.study.runner import run_study

    return run_study
