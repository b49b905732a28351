"""The laboratory: state in, state out; effects only at its edge."""

from training.batch import Batch
from training.hooks import SurpriseHookManager
from training.hyper import HyperParams
from training.hyper_step import TrainState, hyper_step, init_state
from training.main_gradients import per_token_surprise
from training.step_metrics import Metrics
from training.study import run_study

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
