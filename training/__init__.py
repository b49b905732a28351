"""The laboratory: state in, state out; effects only at its edge."""

from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams
from training.step.hyper_step import TrainState, hyper_step, init_state
from training.step.main_pass import per_token_surprise
from training.step.metrics import Metrics
from training.study.runner import run_study

__all__ = [
    "Batch",
    "HyperParams",
    "Metrics",
    "SurpriseHookManager",
    "TrainState",
    "hyper_step",
    "init_state",
    "per_token_surprise",
    "run_study",
]
