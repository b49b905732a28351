"""Logger: three methods that show a run's records elsewhere, and what a record holds for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

ARRAYS_EVERY = 50  # steps between two looks at values of every layer or expert
Record = Mapping[str, Any]  # of a step, as `training.storage.recorder.to_record` makes it


class LoggedRun(NamedTuple):
    """Folder, settings and resumed step of a run, for its loggers."""

    folder: Path
    settings: Mapping[str, Any]
    resume_step: int | None = None  # the last step that was made before; None for a run that begins


@runtime_checkable
class Logger(Protocol):
    """A place for the records of a run. All three are called in a thread of its own; an exception ends the logger."""

    def start(self, run: LoggedRun) -> None:
        """Open the place; of a run that is resumed, the one that it had, without the steps that are made again."""

    def log(self, step: int, record: Record) -> None:
        """Add the record of a step."""

    def finish(self) -> None:
        """Wait until all records are there, and close the place."""


def scalars(record: Record) -> dict[str, int | float]:
    """The numbers of a record, by name."""
    return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}


def arrays(step: int, record: Record) -> dict[str, list[float]]:
    """All entries of each table of a record, such as one of layers and experts; empty at most steps."""
    if step != 1 and step % ARRAYS_EVERY:
        return {}
    tables = {key: [*_entries(value)] for key, value in record.items() if isinstance(value, list)}
    return {key: entries for key, entries in tables.items() if entries}


def _entries(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for inner in value:
            yield from _entries(inner)
    elif value is not None:  # what was not finite
        yield float(value)
