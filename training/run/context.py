"""RunContext: what the parts of a run share, and the records that it holds in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.data.corpus import Splits
from training.distributed.team import ALONE, Team
from training.run.config import RunConfig
from training.run.schedule import LEGS, Leg
from training.run.teacher import Teacher

MOST, ENDS = 4096, 256  # records between the ends at most, of the first and of the last; all records up to MOST steps


def append_record(history: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Append the record of a step; beyond 4096 steps thin the middle of the history now and then."""
    history.append(record)
    now = record["step"]
    if now > MOST and now % ENDS == 0:
        stride, best = 1 << ((now - 1) // MOST).bit_length(), best_step(history)
        history[:] = [
            entry
            for entry in history
            if entry["step"] % stride == 0
            or entry["step"] <= ENDS
            or entry["step"] > now - ENDS
            or entry["step"] == best
        ]


class Best(NamedTuple):
    """The lowest held-out loss that was scored during the run; the first of equals."""

    step: int
    nats: float


def better(best: Best | None, record: Mapping[str, Any]) -> Best | None:
    """The better one of the best so far and a record's score, if it has one."""
    nats = record.get("held_out_nats")
    if not isinstance(nats, int | float) or (best is not None and best.nats <= nats):
        return best
    return Best(record["step"], nats)


def best_of(history: Sequence[Mapping[str, Any]]) -> Best | None:
    """The best score in records, oldest first."""
    return reduce(better, history, None)


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the best score."""
    best = best_of(history)
    return None if best is None else best.step


def scores_since_best(records: Iterable[Mapping[str, Any]]) -> int:
    """Number of held-out scores after the best one, from all records of a run, oldest first."""
    best, since = None, 0
    for record in records:
        if "held_out_nats" in record:
            before, best = best, better(best, record)
            since = since + 1 if best == before else 0
    return since


class EarlyStop(NamedTuple):
    """Reason why a run ended before its last step."""

    step: int  # the last one that was made
    reason: str


class Run(NamedTuple):
    """A run in progress."""

    config: RunConfig
    folder: Path
    corpus: Splits
    history: list[dict[str, Any]]  # the records that `training.run.context` keeps, oldest first
    baselines: dict[str, float]  # bits per byte on the held-out bytes of the final score
    settings: dict[str, Any]  # what a run that goes on from here must have the same
    bytes_per_token: float = 1.0  # of held-out text
    teacher: Teacher | None = None
    team: Team = ALONE
    first_step: int = 0  # at which this process began
    legs: tuple[Leg, ...] = ()  # schedules that its steps follow
    device: torch.device = torch.device("cpu")  # where its steps are computed

    @property
    def tokens_a_step(self) -> int:
        return self.config.batch_size * self.config.sequence_length


def about_of(run: Run) -> dict[str, Any]:
    """Metadata of a run's checkpoint, beside the state: keywords of `save_checkpoint`."""
    return {
        "config_dict": asdict(run.config.model),
        "tokenizer": run.corpus.train.tokenizer.fingerprint,
        "settings": {**run.settings, LEGS: [list(leg) for leg in run.legs]},
    }
