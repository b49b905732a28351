"""The laboratory: state in, state out; effects only at its edge."""

from training.batch import Batch
from training.hooks import SurpriseHookManager
from training.hyper import HyperParams
from training.hyper_step import Metrics, TrainState, hyper_step, init_state, per_token_surprise

__all__ = [
    "Batch",
    "HyperParams",
    "Metrics",
    "SurpriseHookManager",
    "TrainState",
    "hyper_step",
    "init_state",
    "per_token_surprise",
]
