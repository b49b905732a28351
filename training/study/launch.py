"""Train the groups of a study one after another in this process; `study.ray.launcher` hands them to a cluster."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from training.storage.lock import locked
from training.storage.results import Row
from training.study.config import StudyConfig
from training.study.group import Bar, run_group
from training.study.plan import Group
from training.terminal import ProgressBar

Finished = Generator[tuple[Group, list[Row]], None, None]  # groups as they finish, with the rows of their runs
Launch = Callable[[StudyConfig, Sequence[Group], Path, ProgressBar], Finished]
Launcher = Callable[[Path], AbstractContextManager[Launch]]  # of a study's folder; refuses before anything is written
PATIENCE = 30.0  # seconds in which a process that lost its study must have ended


@contextmanager
def local_launcher(folder: Path) -> Iterator[Launch]:
    """In this process."""
    yield _one_after_another


def train_group(study: StudyConfig, group: Group, folder: Path, bar: Bar) -> list[Row]:
    """Train and score a group, from its checkpoint if there is one; no two processes at once."""
    with locked(folder / "checkpoints" / group.name, patience=PATIENCE):
        return run_group(study, group, folder, bar)


def _one_after_another(study: StudyConfig, groups: Sequence[Group], folder: Path, bar: ProgressBar) -> Finished:
    for number, group in enumerate(groups, 1):
        bar.set_description(f"group {number}/{len(groups)}, {len(group.runs)} runs")
        yield group, train_group(study, group, folder, bar)
