"""NaN and infinity in a run: keep the evidence, stop or skip."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_onn_func.tree import walk
from training.errors import UserError
from training.step.batch import Batch
from training.step.finite import WATCHED, finite_runs
from training.step.hyper_step import TrainState
from training.storage.checkpoint import save_checkpoint
from training.storage.checkpoint_files import steps_in

EVIDENCE, MOST = "nonfinite", 3  # folder of states and batches before a bad step, and how many are kept


class NotFinite(UserError):
    """A step's numbers went wrong, on every process of the run."""


def bad_numbers(record: Mapping[str, Any], state: TrainState) -> list[str]:
    """Names of the metrics that are NaN or infinite after a step, or else of such parameters and moments.

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


def keep_evidence(folder: Path, state: TrainState, batch: Batch, **about: Any) -> None:
    """Write the state before a bad step and its batch, for `tiny-onn rerun`; nothing when there are enough already.

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
