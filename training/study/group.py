"""A group of a study's runs: trained in one vmapped program, scored on the held-out text, and put on record."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiny_onn_func.tree import to_device, unstack
from training.data.hf_tokenizer import open_tokenizer, run_tokenizer
from training.errors import UserError
from training.run.device import choose_device
from training.run.evaluate import Score
from training.run.identity import check_same
from training.run.teacher import ask
from training.step.finite import bad_runs, passed_over, where_runs
from training.step.hyper_step import TrainState
from training.step.metrics import Metrics
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import Checkpoint, load_state, named_tensors, open_checkpoint, save_checkpoint
from training.storage.checkpoint_files import clean, steps_in
from training.storage.recorder import Recorder
from training.storage.results import Row
from training.storage.token_atlas import write_atlas
from training.study.config import StudyConfig
from training.study.group_records import open_record, record_step, snapshot
from training.study.group_state import GroupRun, GroupState, start_group, teacher_of
from training.study.plan import Group
from training.study.routing_analysis import routing_facts
from training.study.summary import Outcome, finished_row, write_summary
from training.study.tasks import (
    batches_at,
    began_with,
    corpora_of,
    fingerprints,
    overall,
    score_tasks,
    task_that_ends,
    tasks_of,
)
from training.study.token_atlas import atlas_rows, token_benefits, variance_shares
from training.study.vmapped import vmapped_step


@runtime_checkable
class Bar(Protocol):
    """Progress bar of a group: the part of tqdm's interface that it uses."""

    def update(self, n: int) -> object:
        """Advance by `n` steps of runs."""

    def set_postfix_str(self, s: str, refresh: bool) -> object:
        """Show the state of the group in a few words."""


def run_group(study: StudyConfig, group: Group, folder: Path, bar: Bar) -> list[Row]:
    """Train and score the runs of a group, from its checkpoint if there is one; returns their rows."""
    under_way, checkpoint = _open(study, group, folder)
    state = _first_state(under_way, checkpoint)
    bar.update(int(state.step) * len(group.runs))
    recorders = [open_record(home, int(state.step)) for home in under_way.folders]
    try:
        state = _train(under_way, state, recorders, bar)
    finally:
        for recorder in recorders:
            recorder.close()
    return _finish(under_way, state)


def _open(study: StudyConfig, group: Group, folder: Path) -> tuple[GroupRun, Checkpoint | None]:
    """Open a group with its texts, tokenizer and teacher, and the checkpoint that it resumes from."""
    config, home, first = group.runs[0].config, folder / "checkpoints" / group.name, folder / "runs" / group.runs[0].id
    clean(home / "checkpoints")
    checkpoint = open_checkpoint(home) if steps_in(home / "checkpoints") else None
    if checkpoint is not None:
        tokenizer = run_tokenizer(first, config.tokenizer, checkpoint.tokenizer)
    else:
        tokenizer = open_tokenizer("bytes" if config.tokenizer == "bytes" else first)
    corpora, teacher = corpora_of(study, config, tokenizer), teacher_of(config, tokenizer)
    texts = fingerprints(corpora)
    settings = checkpoint.settings if checkpoint is not None else {}
    check_same({"text": texts}, began_with(folder, group) | settings, folder)
    device, _ = choose_device(config.device)
    return GroupRun(study, group, folder, tokenizer, corpora, texts, teacher, device), checkpoint


def _first_state(group: GroupRun, checkpoint: Checkpoint | None) -> GroupState:
    """The state of a checkpoint, or the runs before their first step."""
    texts = [corpus.train for corpus in group.corpora.values()]
    state = to_device(start_group(group.runs, group.tokenizer if checkpoint is None else None, texts), group.device)
    snap = snapshot(group, state)
    if snap is not None:
        state = state._replace(choices=snap.first_choices)
    return state if checkpoint is None else to_device(load_state(checkpoint, state), group.device)


# Training -------------------------------------------------------------------------------------------------------------


def _train(group: GroupRun, state: GroupState, recorders: Sequence[Recorder], bar: Bar) -> GroupState:
    """Make the remaining steps. Time spent on scores and checkpoints is not training time."""
    config, runs, saved = group.config, len(group.runs), int(state.step)
    step = vmapped_step(group.configs, group.device)
    with BackgroundSaver(partial(_save, group, recorders)) as saver:
        try:
            for number in range(saved + 1, config.steps + 1):
                if bool((state.diverged_at > 0).all()):
                    bar.update((config.steps - number + 1) * runs)
                    break
                new, metrics = _step(group, step, state)
                state = record_step(group, _score_ended(group, new), metrics, recorders)
                bar.update(runs)
                bar.set_postfix_str(_progress(metrics, state), refresh=False)
                if number == config.steps or (config.checkpoint_every and number % config.checkpoint_every == 0):
                    saver.save(named_tensors(state))
                    saved = number
        except (KeyboardInterrupt, UserError):
            if int(state.step) > saved:
                saver.save(named_tensors(state))
            saver.wait()
            raise
    return state


def _step(group: GroupRun, step: Any, state: GroupState) -> tuple[GroupState, Metrics]:
    """One hyper step of every run, with the time that it took."""
    start = time.perf_counter()
    batches = to_device(batches_at(group.corpora, group.runs, int(state.step)), group.device)
    states, metrics = step(state.runs, batches, *ask(group.teacher, batches))
    new = _without_bad_numbers(state, states, metrics, stop=group.config.on_nonfinite == "stop")
    return new._replace(seconds=state.seconds + time.perf_counter() - start), metrics


def _without_bad_numbers(state: GroupState, states: TrainState, metrics: Metrics, *, stop: bool) -> GroupState:
    """State after a step; runs with bad numbers keep the one before, and end there with `stop`."""
    number = int(state.step) + 1
    bad = bad_runs(metrics, states)
    diverged_at = torch.where(bad & (state.diverged_at == 0), number, state.diverged_at) if stop else state.diverged_at
    held = bad | (diverged_at > 0)
    if bool(held.any()):
        states = where_runs(held, passed_over(state.runs), states)
    return state._replace(step=state.step + 1, diverged_at=diverged_at, runs=states)


def _score_ended(group: GroupRun, state: GroupState) -> GroupState:
    """Add the scores of all tasks if a task has just ended; those after the last one are the final ones."""
    config, tasks = group.config, len(tasks_of(group.runs[0]))
    ended = task_that_ends(int(state.step), config.steps, tasks)
    if ended is None or ended == tasks - 1:
        return state
    by_run = score_tasks(state.runs.params, group.runs, group.corpora, config.final_eval_bytes)
    scores = state.scores.clone()
    scores[:, ended] = torch.tensor([[task.nats_per_token for task in run] for run in by_run], dtype=torch.float64)
    return state._replace(scores=scores)


def _save(group: GroupRun, recorders: Sequence[Recorder], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint of the group, once the records of its steps are on the disk."""
    for recorder in recorders:
        recorder.sync()
    save_checkpoint(
        group.home, tensors, asdict(group.config.model), keep=2, tokenizer=group.tokenizer.fingerprint,
        settings={"text": group.texts},
    )  # fmt: skip


def _progress(metrics: Metrics, state: GroupState) -> str:
    alive = metrics.main_loss[state.diverged_at == 0]
    text = f"loss {float(alive.mean()):.3g}" if alive.numel() else "loss nan"
    lost = int((state.diverged_at > 0).sum())
    return f"{text}, {lost} diverged" if lost else text


# The end --------------------------------------------------------------------------------------------------------------


def _finish(group: GroupRun, state: GroupState) -> list[Row]:
    """Score the runs, analyse their routers, and write their summaries; returns their rows."""
    scores = score_tasks(state.runs.params, group.runs, group.corpora, group.config.final_eval_bytes)
    facts, rows = _routing_facts(group, state), []
    for i, params in enumerate(unstack(state.runs.params)):
        diverged_at, score = int(state.diverged_at[i]), _finite(overall(scores[i]))
        outcome = Outcome(
            run=group.runs[i],
            folder=group.folders[i],
            steps=diverged_at or int(state.step),
            seconds=float(state.seconds) / len(group.runs),
            score=None if diverged_at else score,
            facts=None if diverged_at or score is None else facts[i],
            matrix=[*state.scores[i].tolist(), [task.nats_per_token for task in scores[i]]],
        )
        rows.append(finished_row(outcome))
        write_summary(outcome, rows[-1])
        if outcome.score is not None:
            whole = {"params": params, "step": state.step}
            tokenizer = group.tokenizer.fingerprint
            save_checkpoint(outcome.folder, whole, asdict(group.config.model), keep=1, tokenizer=tokenizer)
    return rows


def _finite(score: Score) -> Score | None:
    return score if math.isfinite(score.nats_per_token) else None


def _routing_facts(group: GroupRun, state: GroupState) -> list[dict[str, Any] | None]:
    """Routing analysis of every run on held-out text, with the seconds that it took."""
    tokens = group.study.analysis_tokens
    if not tokens or bool((state.diverged_at > 0).all()):
        return [None] * len(group.runs)
    start = time.perf_counter()
    facts = routing_facts(state.runs.params, group.configs, group.held_out, tokens)
    if atlas_tokens := group.study.atlas_tokens:
        found = token_benefits(state.runs.params, group.configs, group.held_out, atlas_tokens)
        for of_run, benefit, folder in zip(facts, found, group.folders, strict=True):
            of_run["benefit_variance"] = variance_shares(benefit)
            write_atlas(atlas_rows(benefit), lambda token: group.tokenizer.decode([token]), folder)
    seconds = round((time.perf_counter() - start) / len(group.runs), 3)
    return [{**of_run, "seconds": seconds} for of_run in facts]
