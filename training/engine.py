"""The only loop: batches in, hyper steps, records, checkpoints, pictures, and the summary at the end."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tiny_onn_func.generate import generate
from tiny_onn_func.params import count_active_params, count_params
from training.alarms import collapse_alarms
from training.batch import Batch
from training.checkpoint import checkpoint_tokenizer, latest_checkpoint, load_checkpoint, save_checkpoint
from training.compiled import compile_step
from training.data import Splits, baselines, batch_at, held_out_batches, open_corpus, scored_span
from training.errors import UserError
from training.evaluate import Score, evaluate
from training.first_state import first_state
from training.hyper_step import TrainState, hyper_step, init_state
from training.memory import keep_freed_memory
from training.recorder import Recorder, open_recorder, read_history
from training.report import draw_core_metrics, draw_expert_dashboard
from training.run_config import RunConfig, hyper_params, statics
from training.settings import save_settings
from training.step_metrics import Metrics
from training.teacher import Teacher, open_teacher
from training.tokenizer import BYTES, Tokenizer, check_vocab, kept_tokenizer, open_tokenizer, save_tokenizer

ALARM_EVERY = 50  # steps between two looks at the router's health


class Run(NamedTuple):
    """A run that is under way."""

    config: RunConfig
    folder: Path
    corpus: Splits
    history: list[dict[str, Any]]  # every record so far, oldest first
    baselines: dict[str, float]  # bits per byte on the held-out bytes of the final score
    bytes_per_token: float = 1.0  # of held-out text
    teacher: Teacher | None = None


def train(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train as the configuration says, into its run folder; the summary that is also written there.

    Progress goes to the terminal's error stream. Ctrl-C saves a checkpoint and ends with KeyboardInterrupt.

    Raises:
        UserError: the data cannot be used, or the folder holds a run and `resume` was not asked for (or the reverse).
    """
    assert config.out is not None, "the command line fills it in"
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.out)
    checkpoint = _check_folder(folder, resume)
    tokenizer = _tokenizer(config, folder, checkpoint)
    if checkpoint is None:
        state = first_state(config, tokenizer)
    else:
        like = init_state(config.model, torch.Generator().manual_seed(config.seed))
        state = load_checkpoint(checkpoint, like=like)
    run = _open(config, folder, tokenizer)
    seconds = 0.0
    if checkpoint is not None:
        run.history.extend(r for r in read_history(folder) if r["step"] <= int(state.step))
        seconds = run.history[-1]["seconds"] if run.history else 0.0
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        save_tokenizer(tokenizer, folder)
    save_settings(config, folder / "config.yaml")
    with open_recorder(folder, resume_step=int(state.step) if resume else None) as recorder:
        state, seconds = _loop(run, state, seconds, recorder)
    return _finish(run, state, seconds)


def _tokenizer(config: RunConfig, folder: Path, checkpoint: Path | None) -> Tokenizer:
    """What the settings name; of a run that goes on, the copy in its folder, which the settings may not contradict."""
    if checkpoint is None:
        tokenizer = open_tokenizer(config.tokenizer)
    else:
        tokenizer = kept_tokenizer(folder, config.tokenizer, checkpoint_tokenizer(checkpoint))
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
    return Run(config, folder, corpus, [], lines, bytes_per_token, teacher)


def _program(run: Run, state: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics): the hyper step with the run's settings, its teacher, compiled if wanted."""
    config, hyper, teacher = run.config, hyper_params(run.config), run.teacher

    def taught(state: TrainState, batch: Batch, logits: Tensor | None) -> tuple[TrainState, Metrics]:
        return hyper_step(state, batch, hyper, config.model, **statics(config), teacher_logits=logits)

    if not config.compile:
        return lambda state, batch: taught(state, batch, None if teacher is None else teacher(batch))
    batch = batch_at(run.corpus.train, config.seed, 0, config.batch_size, config.sequence_length, config.pack)
    if teacher is None:
        return compile_step(lambda state, batch: taught(state, batch, None), state, batch)
    compiled = compile_step(taught, state, batch, teacher(batch))
    return lambda state, batch: compiled(state, batch, teacher(batch))


def _loop(run: Run, state: TrainState, seconds: float, recorder: Recorder) -> tuple[TrainState, float]:
    """The steps that are left. Time spent on scores, pictures and checkpoints is not training time."""
    config = run.config
    tokens_a_step = config.batch_size * config.sequence_length
    step_of = _program(run, state)
    known_alarms = 0
    first = int(state.step)
    try:
        with tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
            for step in range(first + 1, config.steps + 1):
                start = time.perf_counter()
                batch = batch_at(
                    run.corpus.train, config.seed, step - 1, config.batch_size, config.sequence_length, config.pack
                )
                new_state, metrics = step_of(state, batch)
                values = metrics._asdict()
                seconds += time.perf_counter() - start
                if _due(step, config.eval_every) and step < config.steps:
                    score = held_out_score(run, new_state, config.eval_bytes)
                    values |= {"held_out_nats": score.nats_per_token, "held_out_bits_per_byte": score.bits_per_byte}
                run.history.append(recorder.write(step, step * tokens_a_step, seconds, values))
                state = new_state
                bar.update()
                speed = step * tokens_a_step / seconds
                bar.set_postfix_str(_progress(run.history[-1], speed, run.bytes_per_token), refresh=False)
                if _due(step, ALARM_EVERY):
                    known_alarms = _ring(run, known_alarms)
                if _due(step, config.checkpoint_every) or step == config.steps:
                    save(run, state)
                if _due(step, config.picture_every) and step < config.steps:
                    draw(run)
    except KeyboardInterrupt:
        save(run, state)
        print(
            f"stopped after step {int(state.step)}; go on with: tiny-onn train --out {run.folder} --resume",
            file=sys.stderr,
        )
        raise
    return state, seconds


def _finish(run: Run, state: TrainState, seconds: float) -> dict[str, Any]:
    """Pictures, the final score, the sample and `summary.json`."""
    config = run.config
    score = held_out_score(run, state, config.final_eval_bytes, show=True)
    if run.history:
        run.history[-1] |= {"held_out_nats": score.nats_per_token, "held_out_bits_per_byte": score.bits_per_byte}
    draw(run)
    tokens = int(state.step) * config.batch_size * config.sequence_length
    summary = {
        "bits_per_byte": score.bits_per_byte,
        "nats_per_token": score.nats_per_token,
        "accuracy": score.accuracy,
        "steps": int(state.step),
        "tokens": tokens,
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "avg_k": score.avg_k,
        "parameters": count_params(config.model),
        "active_parameters": round(count_active_params(config.model, score.avg_k)),
        "held_out_bytes": score.bytes,
        "held_out_tokens": score.tokens,
        "baselines": run.baselines,
        "alarms": alarms(run),
        "sample": sample_text(run, state, config.prompt, config.sample_tokens) if config.sample_tokens else "",
    }
    text = json.dumps(summary, indent=2) + "\n"
    draft = run.folder / ".summary.json.tmp"
    draft.write_text(text, encoding="utf-8")
    draft.replace(run.folder / "summary.json")
    return summary


def held_out_score(run: Run, state: TrainState, max_bytes: int | None, *, show: bool = False) -> Score:
    """The score on the first `max_bytes` of the held-out text."""
    config, corpus = run.config, run.corpus.held_out
    batches = held_out_batches(corpus, config.batch_size, config.sequence_length, max_bytes=max_bytes, pack=config.pack)

    bar = partial(tqdm, desc="held-out score", unit="batch", leave=False, disable=not show)
    num_bytes, budget = scored_span(corpus, max_bytes).num_bytes, config.hyper.pi_alpha
    return evaluate(state.params, config.model, batches, num_bytes, surprise_budget=budget, progress=bar)


def sample_text(run: Run, state: TrainState, prompt: str, tokens: int) -> str:
    """The prompt and its continuation; the run's seed decides it."""
    config, tokenizer = run.config, run.corpus.train.tokenizer
    ids = torch.from_numpy(tokenizer.encode_prompt(prompt).astype("int64"))[None]
    generator = torch.Generator().manual_seed(config.seed)
    out = generate(
        state.params, ids, config.model, generator, max_new_tokens=tokens, context_length=config.sequence_length,
        temperature=0.8, surprise_budget=config.hyper.pi_alpha,
    )  # fmt: skip
    return tokenizer.decode(out[0].tolist())


def save(run: Run, state: TrainState) -> None:
    """A checkpoint of this step, unless it is there already."""
    if latest_checkpoint(run.folder) != run.folder / "checkpoints" / f"step_{int(state.step):06d}":
        save_checkpoint(
            run.folder, state, asdict(run.config.model), keep=run.config.keep_checkpoints,
            tokenizer=run.corpus.train.tokenizer.fingerprint,
        )  # fmt: skip


def draw(run: Run) -> None:
    """Both pictures, from all records so far."""
    lines = {name: bits * math.log(2) * run.bytes_per_token for name, bits in run.baselines.items()}
    title = f"{run.folder.name}: {run.config.data}"
    draw_core_metrics(run.history, run.folder / "core_metrics_latest.png", title=title, baselines=lines)
    draw_expert_dashboard(run.history, run.folder / "expert_dashboard_latest.png", alarms=alarms(run), title=title)


def alarms(run: Run) -> list[str]:
    """What is wrong with the routing of the last records, in sentences."""
    model = run.config.model
    return collapse_alarms(
        run.history, model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
        min_experts_per_tok=model.min_experts_per_tok, max_experts_per_tok=model.max_experts_per_tok,
    )  # fmt: skip


def _ring(run: Run, known: int) -> int:
    """Print the alarms when there are more than before; how many there are now."""
    now = alarms(run)
    if len(now) > known:
        for alarm in now:
            tqdm.write(f"ALARM at step {run.history[-1]['step']}: {alarm}", file=sys.stderr)
    return len(now)


def _progress(record: dict[str, Any], tokens_per_second: float, bytes_per_token: float) -> str:
    shown = {
        "loss": record["main_loss"],
        "bits/byte": record["main_loss"] / math.log(2) / bytes_per_token if record["main_loss"] is not None else None,
        "avg_k": record["avg_k"],
        "gating": record["gating_acc"],
        "surprise": record["surprise"],
    }
    parts = [f"{name} {'nan' if value is None else format(value, '.3g')}" for name, value in shown.items()]
    return ", ".join((*parts, f"{tokens_per_second:,.0f} tok/s"))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_folder(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a fresh start."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder or a new name, got the file {folder}; name another one")
    checkpoint = latest_checkpoint(folder)
    if resume and checkpoint is None:
        raise UserError(f"--resume: expected a run with a checkpoint in {folder}, found none; leave --resume away")
    if not resume and (folder / "config.yaml").exists():
        raise UserError(f"--out: expected a new folder, got {folder}, which holds a run; add --resume, or name another")
    return checkpoint
