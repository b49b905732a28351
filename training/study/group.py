"""A group of a study's runs: trained in one vmapped program, scored on the held-out text, and put on record."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiny_onn_func.tree import stack, unstack
from training.data.corpus import Splits
from training.data.hf_tokenizer import open_tokenizer, run_tokenizer
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.run.identity import check_same
from training.run.initial_state import first_state
from training.run.teacher import Teacher, ask, open_teacher
from training.step.finite import bad_runs, passed_over, where_runs
from training.step.hyper_step import TrainState, init_state
from training.step.metrics import Metrics
from training.storage.atomic import write_text
from training.storage.background_saver import BackgroundSaver
from training.storage.checkpoint import load_state, named_tensors, open_checkpoint, save_checkpoint
from training.storage.checkpoint_files import clean, steps_in
from training.storage.recorder import FILE, Recorder, records_upto, rewrite_records
from training.storage.results import Row
from training.study.config import StudyConfig, StudyRun
from training.study.plan import Group
from training.study.routing_analysis import RouterSnapshot, drift, router_snapshot, routing_facts
from training.study.summary import finished_row, write_summary
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
from training.study.vmapped import vmapped_step


class GroupState(NamedTuple):
    """R runs under way in one program; leaves of `runs` have a leading axis R."""

    step: Tensor  # () int64, steps made
    seconds: Tensor  # () float64, of all runs together
    diverged_at: Tensor  # (R,) int64, step at which the loss was no number any more; 0 while it is one
    runs: TrainState
    choices: Tensor  # (R, L, T) int64, first choices at the last evaluation, of which drift is measured; T may be 0
    scores: Tensor  # (R, T - 1, T) float64, nats per token of all tasks after each but the last; NaN while unknown


@runtime_checkable
class Bar(Protocol):
    """What a group tells of its progress: of tqdm, all that it uses."""

    def update(self, n: float) -> object:
        """So many more steps of runs are made."""

    def set_postfix_str(self, s: str, refresh: bool) -> object:
        """How it goes, in a few words."""


def run_group(study: StudyConfig, group: Group, folder: Path, bar: Bar) -> list[Row]:
    """Train and score the runs of a group; their rows."""
    config = group.runs[0].config
    home = folder / "checkpoints" / group.name
    folders = [folder / "runs" / run.id for run in group.runs]
    clean(home / "checkpoints")
    checkpoint = open_checkpoint(home) if steps_in(home / "checkpoints") else None
    if checkpoint:
        tokenizer = run_tokenizer(folders[0], config.tokenizer, checkpoint.tokenizer)
    else:
        tokenizer = open_tokenizer("bytes" if config.tokenizer == "bytes" else folders[0])
    corpora = corpora_of(study, config, tokenizer)
    teacher = teacher_of(config, tokenizer)
    texts = fingerprints(corpora)
    check_same({"text": texts}, began_with(folder, group) | (checkpoint.settings if checkpoint else {}), folder)
    mapped = _start(group.runs, None if checkpoint else tokenizer)
    seen = _router_snapshot(study, mapped, [run.config for run in group.runs], corpora)
    if seen is not None:
        mapped = mapped._replace(choices=seen.first_choices)
    if checkpoint:
        mapped = load_state(checkpoint, mapped)
        bar.update(int(mapped.step) * len(group.runs))
    recorders = [_open_record(one, int(mapped.step)) for one in folders]
    try:
        save = partial(_save, home, recorders, about=asdict(config.model), tokenizer=tokenizer, texts=texts)
        mapped = _train(study, group, mapped, corpora, teacher, recorders, save, bar)
    finally:
        for recorder in recorders:
            recorder.close()
    scores = score_tasks(mapped.runs.params, group.runs, corpora, config.final_eval_bytes)
    facts = _routing_facts(study, mapped, [run.config for run in group.runs], corpora)
    seconds, rows = float(mapped.seconds) / len(group.runs), []
    for i, (run, one, params) in enumerate(zip(group.runs, folders, unstack(mapped.runs.params), strict=True)):
        diverged = int(mapped.diverged_at[i])
        score = None if diverged or not _is_finite(overall(scores[i]).nats_per_token) else overall(scores[i])
        found = None if score is None else facts[i]
        matrix = [*mapped.scores[i].tolist(), [task.nats_per_token for task in scores[i]]]
        rows.append(finished_row(run, score, seconds, one, found, matrix))
        write_summary(run, rows[-1], score, diverged or int(mapped.step), one, found, matrix)
        if score is not None:
            state, sizes = {"params": params, "step": mapped.step}, asdict(config.model)
            save_checkpoint(one, state, sizes, keep=1, tokenizer=tokenizer.fingerprint)
    return rows


def _train(
    study: StudyConfig,
    group: Group,
    mapped: GroupState,
    corpora: Mapping[str, Splits],
    teacher: Teacher | None,
    recorders: Sequence[Recorder],
    save: Callable[[dict[str, Tensor]], None],
    bar: Bar,
) -> GroupState:
    """The steps that are left. Time spent on scores and checkpoints is not training time."""
    configs = [run.config for run in group.runs]
    config = configs[0]
    step = vmapped_step(configs)
    saved = int(mapped.step)
    with BackgroundSaver(save) as saver:
        try:
            for number in range(saved + 1, config.steps + 1):
                if bool((mapped.diverged_at > 0).all()):
                    bar.update((config.steps - number + 1) * len(configs))
                    break
                start = time.perf_counter()
                batches = batches_at(corpora, group.runs, number - 1)
                states, metrics = step(mapped.runs, batches, *ask(teacher, batches))
                new = _without_bad_numbers(mapped, states, metrics, stop=config.on_nonfinite == "stop")
                new = new._replace(seconds=mapped.seconds + time.perf_counter() - start)
                new = _score_ended(group.runs, new, corpora)
                mapped = _record(study, group.runs, new, metrics, corpora, recorders)
                bar.update(len(configs))
                bar.set_postfix_str(_progress(metrics, mapped), refresh=False)
                if number == config.steps or (config.checkpoint_every and number % config.checkpoint_every == 0):
                    saver.save(named_tensors(mapped))
                    saved = number
        except (KeyboardInterrupt, UserError):
            if int(mapped.step) > saved:
                saver.save(named_tensors(mapped))
            saver.wait()
            raise
    return mapped


def _without_bad_numbers(mapped: GroupState, states: TrainState, metrics: Metrics, *, stop: bool) -> GroupState:
    """After a step; runs whose numbers went wrong keep the state that they had, and end there if they are to stop."""
    number = int(mapped.step) + 1
    bad = bad_runs(metrics, states)
    diverged_at = (
        torch.where(bad & (mapped.diverged_at == 0), number, mapped.diverged_at) if stop else mapped.diverged_at
    )
    held = bad | (diverged_at > 0)
    if bool(held.any()):
        states = where_runs(held, passed_over(mapped.runs), states)
    return mapped._replace(step=mapped.step + 1, diverged_at=diverged_at, runs=states)


def _save(
    home: Path, recorders: Sequence[Recorder], tensors: dict[str, Tensor], *, about: Mapping[str, Any],
    tokenizer: Tokenizer, texts: Mapping[str, str],
) -> None:  # fmt: skip
    """A checkpoint of the group, not before the records of its steps are on the disk."""
    for recorder in recorders:
        recorder.sync()
    save_checkpoint(home, tensors, about, keep=2, tokenizer=tokenizer.fingerprint, settings={"text": texts})


def _start(runs: Sequence[StudyRun], tokenizer: Tokenizer | None) -> GroupState:
    """The runs before their first step; without a tokenizer, what a checkpoint of theirs looks like."""
    configs, tasks = [run.config for run in runs], len(tasks_of(runs[0]))
    if tokenizer is None:
        states = [init_state(config.model, torch.Generator().manual_seed(config.seed)) for config in configs]
    else:
        states = _first_states(configs, tokenizer)
    zero = torch.zeros((), dtype=torch.int64)
    diverged_at = torch.zeros(len(configs), dtype=torch.int64)
    choices = torch.empty(len(configs), 0, 0, dtype=torch.int64)
    scores = torch.full((len(configs), tasks - 1, tasks), torch.nan, dtype=torch.float64)
    return GroupState(zero, zero.double(), diverged_at, stack(states), choices, scores)


def _first_states(configs: Sequence[RunConfig], tokenizer: Tokenizer) -> list[TrainState]:
    """The first state of every run; the folder of `init`, which is the same for all, is read once."""
    if configs[0].init is None:
        return [first_state(config) for config in configs]
    return [first_state(configs[0], tokenizer)] * len(configs)


def _score_ended(runs: Sequence[StudyRun], mapped: GroupState, corpora: Mapping[str, Splits]) -> GroupState:
    """With the scores of all tasks, if a task has just ended; those after the last one are the final ones."""
    config, tasks = runs[0].config, len(tasks_of(runs[0]))
    ended = task_that_ends(int(mapped.step), config.steps, tasks)
    if ended is None or ended == tasks - 1:
        return mapped
    found = score_tasks(mapped.runs.params, runs, corpora, config.final_eval_bytes)
    scores = mapped.scores.clone()
    scores[:, ended] = torch.tensor([[task.nats_per_token for task in some] for some in found], dtype=torch.float64)
    return mapped._replace(scores=scores)


# Routing --------------------------------------------------------------------------------------------------------------


def _router_snapshot(
    study: StudyConfig, mapped: GroupState, configs: Sequence[RunConfig], corpora: Mapping[str, Splits]
) -> RouterSnapshot | None:
    """A look at all routers on held-out tokens, of a stream's first named task; None where it is not wanted."""
    if not (study.analysis_tokens and configs[0].eval_every):
        return None
    held_out = next(iter(corpora.values())).held_out
    return router_snapshot(mapped.runs.params, configs, held_out, study.analysis_tokens)


def _routing_facts(
    study: StudyConfig, mapped: GroupState, configs: Sequence[RunConfig], corpora: Mapping[str, Splits]
) -> list[dict[str, Any] | None]:
    """What the runs' routers do on held-out text, with the seconds that it took to find out."""
    if not study.analysis_tokens or bool((mapped.diverged_at > 0).all()):
        return [None] * len(configs)
    start = time.perf_counter()
    held_out = next(iter(corpora.values())).held_out
    facts = routing_facts(mapped.runs.params, configs, held_out, study.analysis_tokens)
    seconds = round((time.perf_counter() - start) / len(configs), 3)
    return [{**found, "seconds": seconds} for found in facts]


# Files ----------------------------------------------------------------------------------------------------------------


def _record(
    study: StudyConfig, runs: Sequence[StudyRun], mapped: GroupState, metrics: Metrics, corpora: Mapping[str, Splits],
    recorders: Sequence[Recorder],
) -> GroupState:  # fmt: skip
    """Append the records of a step, those of runs that diverged earlier left out; with the new first choices."""
    configs = [run.config for run in runs]
    config, step = configs[0], int(mapped.step)
    scored = config.eval_every > 0 and step % config.eval_every == 0
    due = scored or step in (1, config.steps) or step % study.record_every == 0
    diverged = mapped.diverged_at.tolist()
    of_tasks = score_tasks(mapped.runs.params, runs, corpora, config.eval_bytes) if scored else []
    scores = [overall(some) for some in of_tasks]
    seen = _router_snapshot(study, mapped, configs, corpora) if scored else None
    drifts = drift(mapped.choices, seen.first_choices).to(torch.float64) if seen is not None else None
    for i, run in enumerate(unstack(metrics)):
        if diverged[i] == step or (due and not diverged[i]):
            values = run._asdict()
            if scores:
                values |= {"held_out_nats": scores[i].nats_per_token, "held_out_bits_per_byte": scores[i].bits_per_byte}
            if seen is not None and drifts is not None:
                values |= {"routing_drift": float(drifts[i].mean()), "routing_drift_layers": drifts[i]}
                values |= {"co_activation_layers": seen.co_activation[i]}
            tokens = step * config.batch_size * config.sequence_length
            recorders[i].write(step, tokens, float(mapped.seconds) / len(configs), values)
    return mapped if seen is None else mapped._replace(choices=seen.first_choices)


def _open_record(folder: Path, step: int) -> Recorder:
    """The run's metrics.jsonl for appending, without what came after `step`. No TensorBoard: there may be hundreds."""
    path = folder / FILE
    if path.exists():
        rewrite_records(folder, records_upto(folder, step))
    else:
        write_text(path, "")
    return Recorder(path.open("a", encoding="ascii"), None)


def _progress(metrics: Metrics, mapped: GroupState) -> str:
    alive = metrics.main_loss[mapped.diverged_at == 0]
    text = f"loss {float(alive.mean()):.3g}" if alive.numel() else "loss nan"
    lost = int((mapped.diverged_at > 0).sum())
    return f"{text}, {lost} diverged" if lost else text


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def teacher_of(config: RunConfig, tokenizer: Tokenizer) -> Teacher | None:
    return open_teacher(replace(config, teacher_cache=False), tokenizer)
