"""Train the groups of a study one after another in this process; `study.ray.launcher` hands them to a cluster."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tqdm import tqdm

from training.storage.lock import locked
from training.storage.results import Row
from training.study.config import StudyConfig
from training.study.group import Bar, run_chunk
from training.study.plan import Chunk

Finished = Generator[tuple[Chunk, list[Row]], None, None]  # groups as they finish, with the rows of their runs
Launch = Callable[[StudyConfig, Sequence[Chunk], Path, tqdm], Finished]
Launcher = Callable[[Path], AbstractContextManager[Launch]]  # of a study's folder; refuses before anything is written
PATIENCE = 30.0  # seconds in which a process that lost its study must have ended


@contextmanager
def here(folder: Path) -> Iterator[Launch]:
    """In this process."""
    yield _one_after_another


def train_group(study: StudyConfig, chunk: Chunk, folder: Path, bar: Bar) -> list[Row]:
    """Train and score a group, from its checkpoint if there is one; no two processes at once."""
    with locked(folder / "checkpoints" / chunk.name, patience=PATIENCE):
        return run_chunk(study, chunk, folder, bar)


def _one_after_another(study: StudyConfig, chunks: Sequence[Chunk], folder: Path, bar: tqdm) -> Finished:
    for number, chunk in enumerate(chunks, 1):
        bar.set_description(f"group {number}/{len(chunks)}, {len(chunk.runs)} runs")
        yield chunk, train_group(study, chunk, folder, bar)
