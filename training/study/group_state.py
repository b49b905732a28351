"""State of a group of runs: the facts that its runs share, and their stacked TrainStates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tiny_onn_func.tree import stack
from training.data.corpus import Corpus, Splits
from training.data.tokenizer import Tokenizer
from training.run.config import RunConfig
from training.run.initial_state import first_state, with_router
from training.run.teacher import Teacher, open_teacher
from training.step.hyper_step import TrainState, init_state
from training.study.config import StudyConfig, StudyRun
from training.study.plan import Group
from training.study.tasks import tasks_of


class GroupRun(NamedTuple):
    """A group in progress."""

    study: StudyConfig
    group: Group
    folder: Path  # of the study
    tokenizer: Tokenizer
    corpora: Mapping[str, Splits]  # task -> its text
    texts: Mapping[str, str]  # task -> fingerprint of its text
    teacher: Teacher | None
    device: torch.device  # where its steps are computed

    @property
    def runs(self) -> list[StudyRun]:
        return self.group.runs

    @property
    def configs(self) -> list[RunConfig]:
        return [run.config for run in self.group.runs]

    @property
    def config(self) -> RunConfig:
        """Configuration of the first run, whose static settings are those of all."""
        return self.group.runs[0].config

    @property
    def home(self) -> Path:
        """Folder of the group's checkpoints."""
        return self.folder / "checkpoints" / self.group.name

    @property
    def folders(self) -> list[Path]:
        """Folder of each run."""
        return [self.folder / "runs" / run.id for run in self.group.runs]

    @property
    def held_out(self) -> Corpus:
        """Text of the routing analysis: that of a stream's first named task."""
        return next(iter(self.corpora.values())).held_out


class GroupState(NamedTuple):
    """State of R runs in one program; leaves of `runs` have a leading axis R."""

    step: Tensor  # () int64, steps made
    seconds: Tensor  # () float64, of all runs together
    diverged_at: Tensor  # (R,) int64, step at which the loss was no number any more; 0 while it is one
    runs: TrainState
    choices: Tensor  # (R, L, T) int64, first choices at the last evaluation, of which drift is measured; T may be 0
    scores: Tensor  # (R, T - 1, T) float64, nats per token of all tasks after each but the last; NaN while unknown


def start_group(runs: Sequence[StudyRun], tokenizer: Tokenizer | None, texts: Sequence[Corpus] = ()) -> GroupState:
    """State before the first step; without a tokenizer, one of the shapes of the runs' checkpoints."""
    configs, tasks = [run.config for run in runs], len(tasks_of(runs[0]))
    if tokenizer is None:
        states = [init_state(config.model, torch.Generator().manual_seed(config.seed)) for config in configs]
    else:
        first = _first_states(configs, tokenizer)
        states = [with_router(state, config, texts) for state, config in zip(first, configs, strict=True)]
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


def teacher_of(config: RunConfig, tokenizer: Tokenizer) -> Teacher | None:
    """Teacher of a group. It caches no logits on the disk: equal batches are asked for once anyway."""
    return open_teacher(replace(config, teacher_cache=False), tokenizer)
