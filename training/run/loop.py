"""The loop of a run: hyper steps, their records, and the effects that are due after some of them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.distributed.sharded_checkpoint import save_sharded
from training.fields import Field
from training.report.alarms import kind_of
from training.run.context import EarlyStop, Run, about_of, append_record, best_of, better, scores_since_best
from training.run.evaluate import recorded
from training.run.nonfinite import NotFinite, bad_numbers, keep_evidence
from training.run.process import deferred_signals
from training.run.program import Batches, Program, program
from training.run.summary import alarms, draw, held_out_score
from training.step.finite import passed_over
from training.step.hyper_step import TrainState
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import named_tensors, save_checkpoint
from training.storage.recorder import Recorder, iter_history, to_record
from training.terminal import LOG, ProgressBar, progress

SKIPPED = {
    "skipped": Field(
        "true", "Present where `on_nonfinite: skip` left the state as it was, as the step had NaN or infinity."
    )
}
ALARM_EVERY = 50  # steps between two looks at the router's health
BAR = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # tqdm's own is cut at 110 columns
Effects = tuple[tuple[int, Callable[[], object]], ...]  # (steps between two times, 0 for never; what is done then)


def run_steps(run: Run, state: TrainState, recorder: Recorder) -> tuple[TrainState, float, EarlyStop | None]:
    """Make the remaining steps: last state, seconds of all training so far, and the reason of an early end.

    Time spent on scores, pictures and checkpoints is not training time. What `finish` does at the end, scores and
    pictures, is not due after the last step.
    """
    config, first = run.config, int(state.step)
    step_of, seconds = program(run, state), run.history[-1]["seconds"] if run.history else 0.0
    with (
        deferred_signals(run.team.layout.is_sharded) as asked,
        BackgroundSaver(partial(_save, run, recorder)) as saver,
        _bar(run, first) as bar,
        Checkpoints(run, saver, recorder, state).saved_on_error() as checkpoints,
    ):
        effects, batches = _effects(run, checkpoints), Batches(run)
        for step in range(first + 1, config.steps + 1):
            if checkpoints.is_over:
                break
            start = time.perf_counter()
            state, values, end = _step(run, step_of, batches, checkpoints.state, asked)
            seconds += time.perf_counter() - start
            if _due(step, config.eval_every) and step < config.steps:
                values |= _held_out(run, state)
            record = recorder.write(step, step * run.tokens_a_step, seconds, values)
            append_record(run.history, record)
            checkpoints.advance(state, record)
            bar.set_postfix_str(_progress(run, seconds), refresh=False)
            bar.update()
            for every, effect in effects:
                if _due(step, every):
                    effect()
            if end:
                raise KeyboardInterrupt
        checkpoints.save(at_end=True)
    return state, seconds, checkpoints.early_stop()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _effects(run: Run, checkpoints: "Checkpoints") -> Effects:
    """Effects that are due after a step, in this order; ranks other than the first join only the collective ones."""
    saves: Effects = ((run.config.checkpoint_every, checkpoints.save),)
    shows: Effects = ((ALARM_EVERY, _bell(run)), (run.config.picture_every, lambda: _draw(run)))
    return (*saves, *shows) if run.team.first else saves


def _step(
    run: Run, step_of: Program, batches: Batches, state: TrainState, asked: Callable[[], bool]
) -> tuple[TrainState, dict[str, Any], bool]:
    """Make one step: next state, its record, and True if a rank has been asked to stop.

    A step with bad numbers is kept as evidence and never becomes a state.

    Raises:
        NotFinite: it has bad numbers, and the run is to stop.
    """
    config, step = run.config, int(state.step)
    batch = batches.at(step)
    new_state, metrics = step_of(state, batch)
    batches.prepare(step + 1)
    values = to_record(metrics)
    bad, end = bad_numbers(values, new_state), False
    if run.team.layout.is_sharded:  # each process sees its own part of the state, and its own signals
        anywhere, end = run.team.world.all_reduce(torch.tensor([len(bad), asked()]), "bad numbers and signals").tolist()
        bad = bad or ["the state of another process"] * anywhere
    if not bad:
        return new_state, values, bool(end)
    whole = run.team.whole(state, config.model)
    if run.team.first:
        keep_evidence(run.folder, whole, batch, **about_of(run))
    if config.on_nonfinite == "stop":
        raise NotFinite(
            f"step {step + 1}: expected finite numbers, got NaN or inf in {', '.join(bad[:3])}; stopped before it; "
            f"look with `tiny-onn rerun {run.folder} --step {step + 1}`, go on with --resume --on-nonfinite skip"
        )
    return passed_over(state), values | dict.fromkeys(SKIPPED, True), bool(end)


def _held_out(run: Run, state: TrainState) -> dict[str, float]:
    """Held-out score during the run, computed by rank 0 and broadcast to all."""
    whole, scores = run.team.whole(state, run.config.model), {}
    if run.team.first:
        score = held_out_score(run, whole, run.config.eval_bytes)
        scores = recorded(score)
    return run.team.world.broadcast_object(scores)


# Effects --------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Checkpoints of the state after the last whole step: when they are due, at a new best score, and on errors."""

    def __init__(self, run: Run, saver: BackgroundSaver, recorder: Recorder, state: TrainState) -> None:
        self.state, self.best = state, run.team.world.broadcast_object(best_of(run.history))
        self._run, self._saver, self._recorder = run, saver, recorder
        records = iter_history(run.folder) if run.config.stop_when and run.team.first and int(state.step) else ()
        self._waited = run.team.world.broadcast_object(scores_since_best(records))  # scores no better than the best
        self._saved = int(state.step) or None  # a state that has not made a step lies in no checkpoint

    def advance(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """Take the state and the record, which may hold a score, of a completed step."""
        self.state, before = state, self.best
        self.best = better(before, record)
        if "held_out_nats" in record:
            self._waited = self._waited + 1 if self.best == before else 0
        if self.best != before:
            self.save()

    @property
    def is_over(self) -> bool:
        """True if the last `stop_when` held-out scores are no better than the best; the same on every rank."""
        return 0 < self._run.config.stop_when <= self._waited

    def early_stop(self) -> EarlyStop | None:
        """Reason for an end before the last step; None if no step is left, or the run goes on."""
        step = int(self.state.step)
        if not self.is_over or step >= self._run.config.steps:
            return None
        best = "any" if self.best is None else f"{self.best.nats:.4f} nats per token at step {self.best.step}"
        return EarlyStop(step, f"{self._waited} held-out scores in a row no better than {best} (stop_when)")

    def save(self, *, at_end: bool = False) -> None:
        """Save the state unless it is saved: a sharded one as shards, and at the end of the run as a whole."""
        run, step, best = self._run, int(self.state.step), self.best and self.best.step
        in_parts = run.team.layout.is_sharded and step < run.config.steps and not at_end
        if step == self._saved and (in_parts or not run.team.layout.is_sharded):
            return
        if in_parts:
            if run.team.first:
                self._recorder.sync()  # as `_save` does
            kept = run.config.keep_checkpoints
            save_sharded(run.folder, self.state, run.config.model, run.team.layout, about_of(run), kept, best)
        else:
            whole = run.team.whole(self.state, run.config.model)
            if run.team.first:
                self._saver.save(named_tensors(whole), best)
        self._saved = step

    @contextmanager
    def saved_on_error(self) -> Iterator["Checkpoints"]:
        """Save the state after the last whole step before an error that ends the loop is raised."""
        try:
            yield self
        except BaseException as error:
            all_here = isinstance(error, KeyboardInterrupt | NotFinite) or not self._run.team.layout.is_sharded
            if all_here:
                self.save()
            self._saver.wait()
            raise


def _save(run: Run, recorder: Recorder, tensors: dict[str, Tensor], best: int | None) -> None:
    """Write a checkpoint of this step, once the records of its steps are on the disk."""
    recorder.sync()
    save_checkpoint(run.folder, tensors, keep=run.config.keep_checkpoints, best=best, **about_of(run))
    LOG.debug("checkpoint of step %d saved", int(tensors["step"]))


def _bell(run: Run) -> Callable[[], None]:
    """Build the effect that logs each alarm when it begins, and from when to when it was on when it is over."""
    since: dict[str, int] = {}

    def ring() -> None:
        step, now = run.history[-1]["step"], {kind_of(alarm): alarm for alarm in alarms(run.history, run.config)}
        for kind in since.keys() - now.keys():
            LOG.info("alarm over at step %d: %s (it was on from step %d on)", step, kind, since.pop(kind))
        for kind in now.keys() - since.keys():
            LOG.warning("ALARM at step %d: %s", step, now[kind])
            since[kind] = step

    return ring


def _draw(run: Run) -> None:
    """Draw the pictures so far; `finish` draws those after the last step."""
    if run.history[-1]["step"] < run.config.steps:
        draw(run)


def _bar(run: Run, first: int) -> ProgressBar:
    return progress(
        total=run.config.steps, initial=first, unit="step", mininterval=0.5, bar_format=BAR, shown=run.team.first
    )


def _progress(run: Run, seconds: float) -> str:
    record = run.history[-1]
    nats = record["main_loss"]
    shown = {
        "loss": nats,
        "bits/byte": None if nats is None else nats / math.log(2) / run.bytes_per_token,
        "avg_k": record["avg_k"],
        "gating": record["gating_acc"],
        "surprise": record["surprise"],
    }
    parts = [f"{name} {'nan' if value is None else format(value, '.3g')}" for name, value in shown.items()]
    return ", ".join((*parts, f"{record['tokens'] / seconds:,.0f} tok/s"))
