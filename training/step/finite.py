"""NaN and infinity: detect them in the step that produced them, run by run."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from tiny_onn_func.tree import leaves, tree_map
from training.step.hyper_step import TrainState
from training.step.metrics import Metrics

WATCHED = ("main_loss", "distill_loss", "router_loss", "balance_loss", "z_loss", "grad_norm", "router_grad_norm")


def finite_runs(state: Any, *, stacked: bool = True) -> Bool[Tensor, " runs"]:
    """True for each run of finite numbers; leaves of `state` have a leading axis of runs, or there is one run."""
    largest = [
        torch.linalg.vector_norm(leaf.flatten(1) if stacked else leaf.reshape(1, -1), torch.inf, dim=1)
        for leaf in leaves(state)
        if leaf.is_floating_point() and leaf.numel()
    ]
    return torch.stack(largest).isfinite().all(dim=0)


def bad_runs(metrics: Metrics, states: TrainState) -> Bool[Tensor, " runs"]:
    """True for each run with NaN or infinity in a loss, gradient, surprise, parameter or moment; all stacked."""
    watched = torch.stack([getattr(metrics, name) for name in WATCHED])
    return ~watched.isfinite().all(dim=0) | (metrics.nonfinite_surprise > 0) | ~finite_runs(states)


def where_runs(chosen: Bool[Tensor, " runs"], there: TrainState, elsewhere: TrainState) -> TrainState:
    """Select run by run between two stacked states: `there` where `chosen` is True, `elsewhere` where not."""
    return tree_map(
        lambda a, b: torch.where(rearrange(chosen, f"r -> r {'1 ' * (a.ndim - 1)}"), a, b), there, elsewhere
    )


def passed_over(state: TrainState) -> TrainState:
    """State after a skipped step: only the number of the step advances."""
    return state._replace(step=state.step + 1)
