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

from training.batch import Batch
from training.checkpoint import Checkpoint, load_state, named_tensors, open_checkpoint, save_checkpoint
from training.checkpoint_files import clean, remove_steps, steps_in
from training.compiled import compile_step
from training.continuity import check_same, deciding
from training.data import baselines, batch_at, open_corpus, scored_span
from training.errors import UserError
from training.first_state import first_state
from training.folder_lock import locked
from training.guard import bad_numbers, keep_evidence, passed_over
from training.hyper_step import TrainState, hyper_step, init_state
from training.memory import keep_freed_memory
from training.products import Run, about_of, alarms, best_step, draw, finish, held_out_score
from training.recorder import Recorder, open_recorder, read_history, to_record
from training.run_config import RunConfig, hyper_params, statics
from training.saver import Saver
from training.settings import load_settings, save_settings
from training.step_metrics import Metrics
from training.teacher import open_teacher
from training.tokenizer import BYTES, Tokenizer, check_vocab, kept_tokenizer, open_tokenizer, save_tokenizer

Program = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
ALARM_EVERY = 50  # steps between two looks at the router's health


def train(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train as the configuration says, into its run folder; the summary that is also written there.

    Progress goes to the terminal's error stream. Ctrl-C saves a checkpoint and ends with KeyboardInterrupt.

    Raises:
        UserError: the data cannot be used, the folder holds a run and `resume` was not asked for (or the reverse), it
            is in use, it began with other settings, or a number went wrong and `on_nonfinite` is `stop`.
    """
    assert config.out is not None, "the command line fills it in"
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.out)
    _check_folder(folder, resume)
    with locked(folder):
        _check_folder(folder, resume)  # once more: another process may have come first
        try:
            return _train(config, folder, resume)
        except KeyboardInterrupt:
            if (folder / "config.yaml").exists():
                print(f"stopped; go on with: tiny-onn train --out {folder} --resume", file=sys.stderr)
            raise


def _train(config: RunConfig, folder: Path, resume: bool) -> dict[str, Any]:
    clean(folder / "checkpoints")
    checkpoint = open_checkpoint(folder) if steps_in(folder / "checkpoints") else None
    tokenizer = _tokenizer(config, folder, checkpoint)
    run = _open(config, folder, tokenizer)
    if checkpoint is None:
        state = first_state(config, tokenizer)
        save_tokenizer(tokenizer, folder)
    else:
        check_same(run.settings, checkpoint.settings, folder)
        state = load_state(checkpoint, init_state(config.model, torch.Generator().manual_seed(config.seed)))
        run.history.extend(r for r in read_history(folder) if r["step"] <= int(state.step))
        remove_steps(path for step, path in steps_in(folder / "checkpoints") if step > checkpoint.step)  # damaged ones
    save_settings(config, folder / "config.yaml")
    with open_recorder(folder, resume_step=int(state.step) if resume else None) as recorder:
        state, seconds = _loop(run, state, recorder)
    return finish(run, state, seconds)


def _tokenizer(config: RunConfig, folder: Path, checkpoint: Checkpoint | None) -> Tokenizer:
    """What the settings name; of a run that goes on, the copy in its folder, which the settings may not contradict."""
    if checkpoint is None:
        tokenizer = open_tokenizer(config.tokenizer)
    else:
        tokenizer = kept_tokenizer(folder, config.tokenizer, checkpoint.tokenizer)
        there = tokenizer is not BYTES and Path(config.tokenizer).expanduser().exists()
        if there and open_tokenizer(config.tokenizer).fingerprint != tokenizer.fingerprint:
            raise UserError(f"tokenizer: expected the one in {folder}, got another, {config.tokenizer}; leave it away")
    check_vocab(tokenizer, config.model.vocab_size)
    return tokenizer


def _open(config: RunConfig, folder: Path, tokenizer: Tokenizer) -> Run:
    """The run with its data, before its first step."""
    if config.replay:
        raise UserError(f"replay: expected 0 outside a study with tasks, got {config.replay:g}; leave it away")
    teacher = open_teacher(config, tokenizer)
    corpus = open_corpus(
        config.data, holdout=config.holdout, split=config.split, sequence_length=config.sequence_length, progress=True,
        tokenizer=tokenizer,
    )  # fmt: skip
    span = scored_span(corpus.held_out, config.final_eval_bytes)
    lines = baselines(corpus.train, corpus.held_out, config.final_eval_bytes)
    bytes_per_token = 1.0 if tokenizer is BYTES else span.num_bytes / span.num_targets
    return Run(config, folder, corpus, [], lines, deciding(config, corpus), bytes_per_token, teacher)


def program(run: Run, state: TrainState) -> Program:
    """(state, batch) -> (state, metrics): the hyper step with the run's settings, its teacher, compiled if wanted."""
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher

    def taught(state: TrainState, batch: Batch, logits: Tensor | None) -> tuple[TrainState, Metrics]:
        return hyper_step(state, batch, hyper, config.model, **statics(config), teacher_logits=logits)

    if not config.compile:
        return lambda state, batch: taught(state, batch, None if teacher is None else teacher(batch))
    batch = step_batch(run, 0)
    if teacher is None:
        return compile_step(lambda state, batch: taught(state, batch, None), state, batch)
    compiled = compile_step(taught, state, batch, teacher(batch))
    return lambda state, batch: compiled(state, batch, teacher(batch))


def _loop(run: Run, state: TrainState, recorder: Recorder) -> tuple[TrainState, float]:
    """The steps that are left. Time spent on scores, pictures and checkpoints is not training time."""
    config = run.config
    step_of = program(run, state)
    seconds = run.history[-1]["seconds"] if run.history else 0.0
    first = int(state.step)
    saved, best, known_alarms = first if first else None, best_step(run.history), 0
    with (
        Saver(partial(_save, run, recorder)) as saver,
        tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        try:
            for step in range(first + 1, config.steps + 1):
                start = time.perf_counter()
                new_state, values = _step(run, step_of, state)
                seconds += time.perf_counter() - start
                if _due(step, config.eval_every) and step < config.steps:
                    score = held_out_score(run, new_state, config.eval_bytes)
                    values |= {"held_out_nats": score.nats_per_token, "held_out_bits_per_byte": score.bits_per_byte}
                run.history.append(recorder.write(step, step * run.tokens_a_step, seconds, values))
                state = new_state
                bar.update()
                bar.set_postfix_str(_progress(run, seconds), refresh=False)
                if "held_out_nats" in values:
                    best = best_step(run.history)
                if _due(step, config.checkpoint_every) or step in (best, config.steps):
                    saver.save(named_tensors(state), best)
                    saved = step
                if _due(step, ALARM_EVERY):
                    known_alarms = _ring(run, known_alarms)
                if _due(step, config.picture_every) and step < config.steps:
                    draw(run)
        except (KeyboardInterrupt, UserError):
            if int(state.step) != saved:
                saver.save(named_tensors(state), best)
            saver.wait()
            raise
    return state, seconds


def _step(run: Run, step_of: Program, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The next state and the step's record; a step with bad numbers is kept as evidence and never becomes a state.

    Raises:
        UserError: it has bad numbers, and the run is to stop.
    """
    config, step = run.config, int(state.step)
    batch = step_batch(run, step)
    new_state, metrics = step_of(state, batch)
    values = to_record(metrics)
    bad = bad_numbers(values, new_state)
    if not bad:
        return new_state, values
    keep_evidence(run.folder, state, batch, **about_of(run))
    if config.on_nonfinite == "stop":
        raise UserError(
            f"step {step + 1}: expected finite numbers, got NaN or inf in {', '.join(bad[:3])}; stopped before it; "
            f"look with `tiny-onn replay {run.folder} --step {step + 1}`, go on with --resume --on-nonfinite skip"
        )
    return passed_over(state), values | {"skipped": True}


def step_batch(run: Run, step: int) -> Batch:
    """The batch of a step, counted from 0; the seed decides it."""
    config = run.config
    return batch_at(run.corpus.train, config.seed, step, config.batch_size, config.sequence_length, config.pack)


def open_past(folder: str | Path) -> tuple[Run, TrainState]:
    """A run from its folder, without its records, and its first state.

    Raises:
        UserError: there is no run, or its data, tokenizer or first weights cannot be used any more.
    """
    home = Path(folder)
    if not (home / "config.yaml").is_file():
        raise UserError(f"{home}: expected a run folder with a config.yaml, found none; `tiny-onn train` makes one")
    config = load_settings(str(home / "config.yaml"))
    checkpoint = open_checkpoint(home) if steps_in(home / "checkpoints") else None
    tokenizer = _tokenizer(config, home, checkpoint)
    run = _open(config, home, tokenizer)
    if checkpoint is not None:
        check_same(run.settings, checkpoint.settings, home)
    return run, first_state(config, tokenizer)


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


def _check_folder(folder: Path, resume: bool) -> None:
    """Refuse a fresh start where a run is, and a resumed one where none is."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder or a new name, got the file {folder}; name another one")
    begun = (folder / "config.yaml").exists()
    if resume and not begun:
        raise UserError(f"--resume: expected a run in {folder}, found none; leave --resume away")
    if not resume and begun:
        raise UserError(f"--out: expected a new folder, got {folder}, which holds a run; add --resume, or name another")
