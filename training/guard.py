"""Numbers that go wrong: found in the step in which they appear, before they are part of a state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from tiny_onn_func.tree import leaves, tree_map, walk
from training.errors import UserError
from training.step.batch import Batch
from training.step.hyper_step import TrainState
from training.step.metrics import Metrics
from training.storage.checkpoint import save_checkpoint
from training.storage.checkpoint_files import steps_in

WATCHED = ("main_loss", "distill_loss", "router_loss", "balance_loss", "z_loss", "grad_norm", "router_grad_norm")
EVIDENCE, MOST = "nonfinite", 3  # folder of states and batches before a bad step, and how many are kept


class NotFinite(UserError):
    """A step's numbers went wrong, on every process of the run."""


def bad_numbers(record: Mapping[str, Any], state: TrainState) -> list[str]:
    """Names of what is NaN or infinite after a step: losses, gradients, surprise; if none, parameters or moments.

    Args:
        record: the step's metrics as `to_record` gives them, where what is not finite is None.
        state: the state that the step made.
    """
    bad = [name for name in WATCHED if record[name] is None]
    if record["nonfinite_surprise"]:
        bad.append("surprise")
    if not bad and not bool(finite_runs(state, stacked=False).all()):
        bad = [name for name, leaf in walk(state) if not bool(leaf.isfinite().all())]
    return bad


def finite_runs(state: Any, *, stacked: bool = True) -> Bool[Tensor, " runs"]:
    """Whether every number of a run is finite; leaves of `state` have a leading axis of runs, or there is one run."""
    largest = [
        torch.linalg.vector_norm(leaf.flatten(1) if stacked else leaf.reshape(1, -1), torch.inf, dim=1)
        for leaf in leaves(state)
        if leaf.is_floating_point() and leaf.numel()
    ]
    return torch.stack(largest).isfinite().all(dim=0)


def bad_runs(metrics: Metrics, states: TrainState) -> Bool[Tensor, " runs"]:
    """Whether a run's step has NaN or infinity in a loss, gradient, surprise, parameter or moment; all stacked."""
    watched = torch.stack([getattr(metrics, name) for name in WATCHED])
    return ~watched.isfinite().all(dim=0) | (metrics.nonfinite_surprise > 0) | ~finite_runs(states)


def where_runs(chosen: Bool[Tensor, " runs"], there: TrainState, elsewhere: TrainState) -> TrainState:
    """The first state of the chosen runs, the second of the others; all stacked."""
    return tree_map(
        lambda a, b: torch.where(rearrange(chosen, f"r -> r {'1 ' * (a.ndim - 1)}"), a, b), there, elsewhere
    )


def passed_over(state: TrainState) -> TrainState:
    """The state after a step that was not taken: only the step's number moves on."""
    return state._replace(step=state.step + 1)


def keep_evidence(folder: Path, state: TrainState, batch: Batch, **about: Any) -> None:
    """Write the state before a bad step and its batch, for `tiny-onn replay`; nothing when there are enough already.

    Args:
        folder: the run's.
        about: keywords of `save_checkpoint`.

    Raises:
        UserError: the disk refuses.
    """
    home = folder / EVIDENCE
    kept = [step for step, _ in steps_in(home / "checkpoints")]
    if int(state.step) not in kept and len(kept) < MOST:
        save_checkpoint(home, {"step": state.step, "state": state, "batch": batch}, keep=MOST, **about)
