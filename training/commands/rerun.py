"""`tiny-onn rerun`: make one step of a run again, from the state before it on its batch, and show all its numbers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiny_onn_func.tree import partition, walk
from training.errors import UserError
from training.run.config import hyper_params, statics
from training.run.context import Run
from training.run.nonfinite import EVIDENCE, bad_numbers
from training.run.program import Program, program, step_batch
from training.run.schedule import config_at
from training.run.start import open_past
from training.step.batch import Batch
from training.step.finite import passed_over
from training.step.hyper_step import TrainState
from training.step.main_pass import StepOptions, main_gradients
from training.storage.checkpoint import load_state, open_checkpoint
from training.storage.checkpoint_files import Damaged, read_meta, steps_in
from training.storage.recorder import FILE, iter_history, to_record


class Rerun(NamedTuple):
    """Result of making a step again."""

    step: int
    start: str  # where the state came from
    steps_before: int  # that were made again to get there
    record: dict[str, Any]  # as in metrics.jsonl
    differences: list[str] | None  # keys whose recorded value is another; None where nothing was recorded
    bad: list[str]  # what is NaN or infinite after it
    gradients: dict[str, tuple[float, int]]  # name -> largest finite magnitude, entries that are NaN or infinite


def rerun(folder: str | Path, step: int) -> Rerun:
    """Make step `step` of a run again, writing nothing.

    The state before it is the evidence that a bad step left, or the newest checkpoint before it, from which the steps
    between are made again, too; without any, the run's first state.

    Raises:
        UserError: no run in the folder, or no such step.
    """
    run, first = open_past(folder)
    if not 1 <= step <= run.config.steps:
        raise UserError(f"--step: expected 1 to {run.config.steps}, the steps of {folder}, got {step}")
    state, batch, start = _before(run, first, step)
    begun = int(state.step)
    program_at = _programs(run, state)
    while int(state.step) < step - 1:
        at = int(state.step)
        new, metrics = program_at(at + 1)(state, step_batch(run, at))
        state = passed_over(state) if bad_numbers(to_record(metrics), new) else new
    batch = step_batch(run, step - 1) if batch is None else batch
    new, metrics = program_at(step)(state, batch)
    record = to_record(metrics)
    return Rerun(
        step, start, step - 1 - begun, record, _differences(run.folder, step, record), bad_numbers(record, new),
        dict(_gradients(run, state, batch)),
    )  # fmt: skip


def _programs(run: Run, state: TrainState) -> Callable[[int], Program]:
    """Map a step to its program, with the schedule that held at that step; one program for each schedule."""
    known: dict[int, Program] = {}

    def program_at(step: int) -> Program:
        config = config_at(run.config, run.legs, step)
        if config.steps not in known:
            known[config.steps] = program(run._replace(config=config), state)
        return known[config.steps]

    return program_at


def _before(run: Run, first: TrainState, step: int) -> tuple[TrainState, Batch | None, str]:
    """The nearest state before a step, with the step's batch where that was kept."""
    home = run.folder / EVIDENCE / "checkpoints"
    for at, path in steps_in(home):
        if at == step - 1:
            like = {"step": first.step, "state": first, "batch": step_batch(run, at)}
            kept = load_state(open_checkpoint(path), like)
            return kept["state"], kept["batch"], str(path)
    for at, path in reversed(steps_in(run.folder / "checkpoints")):
        if at < step:
            try:
                read_meta(path)
            except Damaged:
                continue
            return load_state(open_checkpoint(path), first), None, str(path)
    return first, None, "the first state of the run"


def _differences(folder: Path, step: int, record: dict[str, Any]) -> list[str] | None:
    if not (folder / FILE).exists():
        return None
    past = [line for line in iter_history(folder) if line.get("step") == step]
    return [key for key, value in record.items() if past[0].get(key) != value] if past else None


def _gradients(run: Run, state: TrainState, batch: Batch) -> Iterator[tuple[str, tuple[float, int]]]:
    """Largest finite entry and number of non-finite ones: the main loss's gradient leaf by leaf, and surprise."""
    config = run.config
    logits = None if run.teacher is None else run.teacher(batch)
    grads, observed = main_gradients(
        *partition(state.params),
        batch,
        hyper_params(config),
        config.model,
        state.step,
        StepOptions(**statics(config)),
        logits,
    )
    for name, leaf in walk(grads[0]):
        yield name, _extremes(leaf)
    surprise = observed.per_token_surprise
    yield "surprise", (_extremes(surprise)[0], int(observed.nonfinite))


def _extremes(leaf: Tensor) -> tuple[float, int]:
    finite = leaf.isfinite()
    return float(torch.where(finite, leaf, 0).abs().max()), int((~finite).sum())


def rerun_table(result: Rerun) -> str:
    """Table of the step's scalars and gradients, and of the differences from the recorded step."""
    lines = [f"step {result.step}, from {result.start}, {result.steps_before} steps made again before it", ""]
    lines += [f"{name:<19} {value}" for name, value in result.record.items() if not isinstance(value, list)]
    lines += ["", f"{'gradient of the main loss':<40} {'largest':>12} {'not finite':>11}"]
    lines += [f"{name:<40} {largest:>12.4g} {bad:>11,}" for name, (largest, bad) in result.gradients.items()]
    lines += ["", f"NaN or infinite: {', '.join(result.bad) or 'nothing'}"]
    if result.differences is None:
        lines.append("on record: no such step")
    else:
        lines.append(f"on record: {'other ' + ', '.join(result.differences) if result.differences else 'the same'}")
    return "\n".join(lines)
