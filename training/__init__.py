"""The laboratory: state in, state out; effects only at its edge."""

from importlib import import_module  # noqa: TID251 - of the homes below alone
from typing import TYPE_CHECKING, Any

import tiny_onn_func  # noqa: F401  before torch: it bounds how long OpenMP's threads spin

if TYPE_CHECKING:
    from training.step.batch import Batch
    from training.step.hooks import SurpriseHookManager
    from training.step.hyper_params import HyperParams
    from training.step.hyper_step import TrainState, hyper_step, init_state, state_of
    from training.step.main_pass import per_token_surprise
    from training.step.metrics import Metrics
    from training.step.rules import Rule, Targets
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

_HOMES = {
    "Batch": "step.batch",
    "HyperParams": "step.hyper_params",
    "Metrics": "step.metrics",
    "Rule": "step.rules",
    "SurpriseHookManager": "step.hooks",
    "Targets": "step.rules",
    "TrainState": "step.hyper_step",
    "hyper_step": "step.hyper_step",
    "init_state": "step.hyper_step",
    "per_token_surprise": "step.main_pass",
    "run_study": "study.runner",
    "state_of": "step.hyper_step",
}


def __getattr__(name: str) -> Any:
    """Import a name, and with it torch, when it is first asked for: the command line starts, and stops, without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
