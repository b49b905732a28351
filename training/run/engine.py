"""The only loop: batches in, hyper steps, records, checkpoints, pictures, and the summary at the end."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.data.batches import batch_at
from training.distributed.parallel_step import parallel_step
from training.distributed.sharded_checkpoint import save_sharded
from training.distributed.team import ALONE, Team
from training.errors import UserError
from training.run.config import RunConfig, hyper_params, statics
from training.run.context import Run, about_of, append_record, best_step
from training.run.identity import check_same
from training.run.nonfinite import NotFinite, bad_numbers, keep_evidence
from training.run.process import deferred_signals, disable_heap_trimming
from training.run.start import begin, check_folder, newest_checkpoint, open_new, tokenizer_of
from training.run.summary import alarms, draw, finish, held_out_score
from training.step.batch import Batch
from training.step.compile import compile_step
from training.step.finite import passed_over
from training.step.hyper_step import TrainState, hyper_step
from training.step.metrics import Metrics
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import named_tensors, save_checkpoint
from training.storage.lock import locked
from training.storage.recorder import Recorder, no_recorder, open_recorder, to_record

Program = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
ALARM_EVERY = 50  # steps between two looks at the router's health


def train(config: RunConfig, *, resume: bool = False, team: Team = ALONE) -> dict[str, Any]:
    """Train as the configuration says, into its run folder; the summary that is also written there.

    Progress goes to the terminal's error stream. Ctrl-C saves a checkpoint and ends with KeyboardInterrupt. Of a team,
    process 0 alone writes, and has a summary; a team that torchrun has begun again goes on where there is a run.

    Raises:
        UserError: the data cannot be used, the folder holds a run and `resume` was not asked for (or the reverse), it
            is in use, it began with other settings, or a number went wrong and `on_nonfinite` is `stop`.
    """
    assert config.out is not None, "the command line fills it in"
    disable_heap_trimming()
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.out)
    resume = team.world.broadcast_object(resume or (team.restarts > 0 and (folder / "config.yaml").exists()))
    if not team.first:
        return _train(config, folder, resume, team)
    check_folder(folder, resume)
    with locked(folder):
        check_folder(folder, resume)  # once more: another process may have come first
        try:
            return _train(config, folder, resume, team)
        except KeyboardInterrupt:
            if (folder / "config.yaml").exists():
                program = "tiny-onn" if team.world.size == 1 else "torchrun ... -m training"
                print(f"stopped; go on with: {program} train --out {folder} --resume", file=sys.stderr)
            raise


def _train(config: RunConfig, folder: Path, resume: bool, team: Team) -> dict[str, Any]:
    checkpoint = team.world.broadcast_object(newest_checkpoint(folder) if team.first else None)
    tokenizer = tokenizer_of(config, folder, checkpoint)
    run = team.one_by_one(lambda: open_new(config, folder, tokenizer, team))
    if team.world.broadcast_object(run.settings["text"]) != run.settings["text"]:
        raise UserError(f"data: expected the text of rank 0 on every rank, got another on rank {team.world.rank}")
    if checkpoint is not None:
        check_same(run.settings, checkpoint.settings, folder)
    state = begin(run, checkpoint, tokenizer)
    run = run._replace(first_step=int(state.step))
    resume_step = int(state.step) if resume else None
    with open_recorder(folder, resume_step=resume_step) if team.first else no_recorder() as recorder:
        state, seconds = _loop(run, state, recorder)
    state = team.whole(state, config.model)
    return finish(run, state, seconds) if team.first else {}


def program(run: Run, state: TrainState) -> Program:
    """(state, batch) -> (state, metrics): the hyper step with the run's settings, its teacher, compiled if wanted."""
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher
    if run.team.world.size > 1:
        return _program_of_many(run)

    def taught(state: TrainState, batch: Batch, logits: Tensor | None) -> tuple[TrainState, Metrics]:
        return hyper_step(state, batch, hyper, config.model, **statics(config), teacher_logits=logits)

    if not config.compile:
        return lambda state, batch: taught(state, batch, None if teacher is None else teacher(batch))
    batch = step_batch(run, 0)
    if teacher is None:
        return compile_step(lambda state, batch: taught(state, batch, None), state, batch)
    compiled = compile_step(taught, state, batch, teacher(batch))
    return lambda state, batch: compiled(state, batch, teacher(batch))


def _program_of_many(run: Run) -> Program:
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = run.team.rows(batch)
        logits = None if teacher is None else teacher(own)
        return parallel_step(
            state, own, hyper, config.model, run.team.layout, **statics(config), teacher_logits=logits
        )  # fmt: skip

    return step


def _loop(run: Run, state: TrainState, recorder: Recorder) -> tuple[TrainState, float]:
    """The steps that are left. Time spent on scores, pictures and checkpoints is not training time."""
    config, writes = run.config, run.team.first
    step_of = program(run, state)
    seconds = run.history[-1]["seconds"] if run.history else 0.0
    first = int(state.step)
    saved, best, known_alarms = first if first else None, run.team.world.broadcast_object(best_step(run.history)), 0
    with (
        deferred_signals(run.team.layout.is_sharded) as asked,
        BackgroundSaver(partial(_save, run, recorder)) as saver,
        tqdm(
            total=config.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not writes
        ) as bar,
    ):
        try:
            for step in range(first + 1, config.steps + 1):
                start = time.perf_counter()
                new_state, values, end = _step(run, step_of, state, asked)
                seconds += time.perf_counter() - start
                if _due(step, config.eval_every) and step < config.steps:
                    values |= _held_out(run, new_state)
                append_record(run.history, recorder.write(step, step * run.tokens_a_step, seconds, values))
                state = new_state
                bar.update()
                bar.set_postfix_str(_progress(run, seconds), refresh=False)
                if "held_out_nats" in values:
                    best = best_step(run.history)
                if _due(step, config.checkpoint_every) or step in (best, config.steps):
                    _keep(run, saver, recorder, state, best)
                    saved = step
                if _due(step, ALARM_EVERY) and writes:
                    known_alarms = _ring(run, known_alarms)
                if _due(step, config.picture_every) and step < config.steps and writes:
                    draw(run)
                if end:
                    raise KeyboardInterrupt
        except BaseException as error:  # whatever it is, the state after the last whole step is good
            all_here = isinstance(error, KeyboardInterrupt | NotFinite) or not run.team.layout.is_sharded
            if int(state.step) != saved and all_here:
                _keep(run, saver, recorder, state, best)
            saver.wait()
            raise
    return state, seconds


def _step(
    run: Run, step_of: Program, state: TrainState, asked: Callable[[], bool]
) -> tuple[TrainState, dict[str, Any], bool]:
    """The next state, the step's record, and whether a process is asked to stop.

    A step with bad numbers is kept as evidence and never becomes a state.

    Raises:
        NotFinite: it has bad numbers, and the run is to stop.
    """
    config, step = run.config, int(state.step)
    batch = step_batch(run, step)
    new_state, metrics = step_of(state, batch)
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
            f"look with `tiny-onn replay {run.folder} --step {step + 1}`, go on with --resume --on-nonfinite skip"
        )
    return passed_over(state), values | {"skipped": True}, bool(end)


def _held_out(run: Run, state: TrainState) -> dict[str, float]:
    """The score during the run, made by process 0 and told to all."""
    whole, found = run.team.whole(state, run.config.model), {}
    if run.team.first:
        score = held_out_score(run, whole, run.config.eval_bytes)
        found = {"held_out_nats": score.nats_per_token, "held_out_bits_per_byte": score.bits_per_byte}
    return run.team.world.broadcast_object(found)


def step_batch(run: Run, step: int) -> Batch:
    """The batch of a step, counted from 0; the seed decides it."""
    config = run.config
    return batch_at(run.corpus.train, config.seed, step, config.batch_size, config.sequence_length, config.pack)


def _keep(run: Run, saver: BackgroundSaver, recorder: Recorder, state: TrainState, best: int | None) -> None:
    """A checkpoint: of a state in many parts one of many parts, and at the end of the run a whole one."""
    config, team, step = run.config, run.team, int(state.step)
    if team.layout.is_sharded and step < config.steps:
        if team.first:
            recorder.sync()  # as `_save` does
        save_sharded(run.folder, state, config.model, team.layout, about_of(run), config.keep_checkpoints, best)
        return
    whole = team.whole(state, config.model)
    if team.first:
        saver.save(named_tensors(whole), best)


def _save(run: Run, recorder: Recorder, tensors: dict[str, Tensor], best: int | None) -> None:
    """A checkpoint of this step, not before the records of its steps are on the disk."""
    recorder.sync()
    save_checkpoint(run.folder, tensors, keep=run.config.keep_checkpoints, best=best, **about_of(run))


def _ring(run: Run, known: int) -> int:
    """Print the alarms when there are more than before; how many there are now."""
    now = alarms(run)
    if len(now) > known:
        for alarm in now:
            tqdm.write(f"ALARM at step {run.history[-1]['step']}: {alarm}", file=sys.stderr)
    return len(now)


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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
