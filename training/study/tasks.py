"""Stream of tasks: the task of a step, batches with replay, the matrix of scores and its measures of forgetting.

A run goes through T tasks one after the other, each for steps / T steps. Written with the losses

    R[i][j] = held-out nats per token of the j-th task of the run's order, after training on the i-th one

the measures are, with T for the last task,

    nats_per_token = mean over j of R[T][j]                              less is better; arms are compared by it
    bwt            = mean over j < T of R[j][j] - R[T][j]                less than 0 is forgetting, as in the field
    forgetting     = mean over j < T of R[T][j] - min over i < T of R[i][j]      0 is none
    plasticity     = mean over j of R[j][j]                              loss of a task just learned; less is better

so `bwt` is the backward transfer of Lopez-Paz and Ranzato (arXiv 1706.08840) with the negated loss as score, and
`forgetting` that of Chaudhry et al. (arXiv 1801.10112), who take the best of all earlier scores.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiny_onn_func.tree import Tree, stack
from training.data.batches import batch_at
from training.data.corpus import Splits, fingerprint, open_corpus
from training.data.hf_tokenizer import open_tokenizer
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.run.config import RunConfig
from training.run.evaluate import Score, score_runs
from training.run.identity import check_same
from training.step.batch import Batch
from training.storage.atomic import write_text
from training.storage.regular_file import read_small
from training.study.config import StudyConfig, StudyRun
from training.study.plan import Group

ONLY = ""  # name of the task of a run that has one text
REPLAY = 1 << 64  # added to the seed: draws of replay are none of those of batches, whose seeds are below 2**63
Matrix = Sequence[Sequence[float]]  # R: R[i][j] in nats per token


class Continual(NamedTuple):
    """Measures of a matrix of scores, in nats per token."""

    bwt: Annotated[float, "nats per token"]
    """Backward transfer: mean over the earlier tasks of (loss just after learning - loss at the end)."""
    forgetting: Annotated[float, "nats per token"]
    """Mean over the earlier tasks of (loss at the end - lowest loss before); 0 is none."""
    plasticity: Annotated[float, "nats per token"]
    """Mean loss of a task just after it was learned; less is better."""


def continual_measures(matrix: Matrix) -> Continual:
    """The measures of a square matrix of losses with two tasks or more."""
    last, earlier = len(matrix) - 1, range(len(matrix) - 1)
    return Continual(
        bwt=fmean(matrix[j][j] - matrix[last][j] for j in earlier),
        forgetting=fmean(matrix[last][j] - min(matrix[i][j] for i in earlier) for j in earlier),
        plasticity=fmean(matrix[j][j] for j in range(len(matrix))),
    )


# The stream -----------------------------------------------------------------------------------------------------------


def texts_of(study: StudyConfig, config: RunConfig) -> dict[str, str]:
    """Name -> text (as `data`) of all tasks of the study's runs; of a run without a stream, its own text as ONLY."""
    return dict(study.tasks) or {ONLY: config.data}


def tasks_of(run: StudyRun) -> tuple[str, ...]:
    """Names of the run's tasks in its order; one for a run without a stream."""
    return run.order or (ONLY,)


def task_at(step: int, steps: int, tasks: int) -> int:
    """Position of the task of a step, both counted from 0; `steps` are all steps of the run, a multiple of `tasks`."""
    return step * tasks // steps


def task_that_ends(step: int, steps: int, tasks: int) -> int | None:
    """Position of the task that is over when `step` steps are made; None where none has just ended."""
    return step * tasks // steps - 1 if step and step * tasks % steps == 0 else None


def row_tasks(position: int, seed: int, step: int, rows: int, replay: float) -> npt.NDArray[np.int64]:
    """(rows,) positions of the tasks that the rows of a batch come from: a pure function of (seed, step).

    Of the rows, the last n are of earlier tasks, each equally likely: n = floor(replay * rows + u), u uniform in
    [0, 1), so n is the same in every step where replay * rows is whole, and has that mean elsewhere. There is no replay
    during the first task.
    """
    positions = np.full(rows, position, dtype=np.int64)
    if position and replay:
        stream = np.random.Philox(key=int(seed) + REPLAY, counter=int(step) << 64)
        uniform = (int(stream.random_raw()) >> 11) / (1 << 53)
        count = min(rows, int(replay * rows + uniform))
        positions[rows - count :] = stream.random_raw(count) % np.uint64(position)
    return positions


def batches_at(corpora: Mapping[str, Splits], runs: Sequence[StudyRun], step: int) -> Batch:
    """The runs' batches of a step, stacked. Row b of a task's batch is the same in all runs of a seed.

    Args:
        corpora: task -> its text; the only one of runs without a stream is called ONLY.
        step: counted from 0.
    """
    drawn: dict[tuple[str, int], Batch] = {}

    def of_task(task: str, config: RunConfig) -> Batch:
        if (task, config.seed) not in drawn:
            drawn[task, config.seed] = batch_at(
                corpora[task].train, config.seed, step, config.batch_size, config.sequence_length, config.pack
            )
        return drawn[task, config.seed]

    def of_run(run: StudyRun) -> Batch:
        config, order = run.config, tasks_of(run)
        position = task_at(step, config.steps, len(order))
        origins = row_tasks(position, config.seed, step, config.batch_size, config.replay)
        batch = of_task(order[position], config)
        for origin in sorted({*origins.tolist()} - {position}):
            chosen = torch.from_numpy(origins == origin)[:, None]
            earlier = of_task(order[origin], config)
            batch = Batch(*(torch.where(chosen, old, new) for old, new in zip(earlier, batch, strict=True)))
        return batch

    return stack([of_run(run) for run in runs])


# Scores ---------------------------------------------------------------------------------------------------------------


def score_tasks(
    params: Tree, runs: Sequence[StudyRun], corpora: Mapping[str, Splits], max_bytes: int | None
) -> list[list[Score]]:
    """For each run, the scores of all its tasks in its order; `params` are stacked.

    Args:
        max_bytes: of held-out text, of each task.
    """
    configs = [run.config for run in runs]
    scores = {task: score_runs(params, configs, text, max_bytes) for task, text in corpora.items()}
    return [[scores[task][i] for task in tasks_of(run)] for i, run in enumerate(runs)]


def overall(scores: Sequence[Score]) -> Score:
    """The score of all tasks, each with the same weight; of one task, its score."""
    return Score(
        nats_per_token=fmean(score.nats_per_token for score in scores),
        bits_per_byte=fmean(score.bits_per_byte for score in scores),
        accuracy=fmean(score.accuracy for score in scores),
        avg_k=fmean(score.avg_k for score in scores),
        tokens=sum(score.tokens for score in scores),
        bytes=sum(score.bytes for score in scores),
    )


FILE = Path("checkpoints", "texts.json")  # of a study's folder: group -> task -> fingerprint


def corpora_of(study: StudyConfig, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Splits]:
    """Task -> its text."""
    how: dict[str, Any] = {"holdout": config.holdout, "split": config.split, "tokenizer": tokenizer}
    return {
        task: open_corpus(data, sequence_length=config.sequence_length, progress=True, **how)
        for task, data in texts_of(study, config).items()
    }


def fingerprints(corpora: Mapping[str, Splits]) -> dict[str, str]:
    """Fingerprint of each task's text."""
    return {task: fingerprint(corpus) for task, corpus in corpora.items()}


def save_texts(texts: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Write the fingerprints of the texts of a study's groups, beside those of earlier ones."""
    earlier = json.loads(read_small(folder / FILE)) if (folder / FILE).exists() else {}
    write_text(folder / FILE, json.dumps({**earlier, **texts}, indent=1) + "\n")


def began_with(folder: Path, group: Group) -> dict[str, Any]:
    """Fingerprints of a group's texts, for `check_same`; empty in a folder of a version that did not write them.

    Raises:
        UserError: it is damaged.
    """
    try:
        return {"text": dict(json.loads(read_small(folder / FILE))[group.name])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder / FILE}: expected the fingerprints of this study's texts, got others or none; name a new --out"
        ) from None


def check_texts(study: StudyConfig, groups: Sequence[Group], folder: Path) -> None:
    """Refuse to go on with any group where the text of one has changed.

    Raises:
        UserError: it has.
    """
    for group in groups:
        first = group.runs[0]
        tokenizer = open_tokenizer("bytes" if first.config.tokenizer == "bytes" else folder / "runs" / first.id)
        now = fingerprints(corpora_of(study, first.config, tokenizer))
        check_same({"text": now}, began_with(folder, group), folder)
