"""The record of a run: `metrics.jsonl`, one JSON object a line, from which loggers show what they can."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from training.errors import UserError
from training.fields import Field
from training.storage.atomic import flush, make_folder, write_text
from training.storage.logger import LoggedRun
from training.storage.loggers import Loggers
from training.storage.regular_file import MOST, open_regular

FILE = "metrics.jsonl"
PROGRESS = {  # of every record, before the metrics
    "step": Field("steps", "Number of the step, counted from 1."),
    "tokens": Field("tokens", "Tokens trained on up to this step."),
    "seconds": Field("s", "Training time up to this step, without scores, pictures and checkpoints."),
}
SCALAR_DIGITS, TABLE_DIGITS = 6, 4  # significant digits kept of scalars, and of entries of tensors with axes


def to_record(metrics: Any) -> dict[str, Any]:
    """A NamedTuple or mapping of tensors and numbers -> plain numbers and nested lists, with one device sync.

    Floats keep 6 significant digits (4 inside lists); what is not finite becomes None, which JSON writes as null.
    """
    items = dict(metrics) if isinstance(metrics, Mapping) else metrics._asdict()
    tensors = {key: value.detach() for key, value in items.items() if isinstance(value, Tensor)}
    numbers = iter(torch.cat([t.reshape(-1) for t in tensors.values()]).tolist() if tensors else [])
    return {
        key: _nested(numbers, value.shape, value.dtype) if isinstance(value, Tensor) else _plain(value, SCALAR_DIGITS)
        for key, value in items.items()
    }


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder, oldest first; a last line that a killed process left torn is dropped.

    Raises:
        UserError: there is no record, or a line before the last is no JSON object.
    """
    return [*iter_history(folder)]


def iter_history(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The records of `read_history`, one by one."""
    path = Path(folder) / FILE
    try:
        with open_regular(path) as file:
            yield from (record for _, record in parsed_lines(file, path) if record is not None)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: expected the record of a run, found no such file; name a run folder") from None


def parsed_lines(file: BinaryIO, path: Path, first: int = 1) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(bytes, record) of each line from here on, number `first`; None for a blank one. A torn last line is left out.

    Raises:
        UserError: a line before the last is no JSON object.
    """
    torn = ""  # what is wrong with the last line, if something is
    for number, line in enumerate(iter(partial(file.readline, MOST + 1), b""), first):
        if torn and line.strip():
            raise UserError(torn)
        record = _parse(line) if line.strip() and len(line) <= MOST else None
        if record is None and line.strip():
            torn = _torn(path, number, line)
        if not torn:
            yield len(line), record


def torn_line(folder: str | Path) -> str | None:
    """Describe the torn last line of a record, as a killed process leaves it; None if it is whole."""
    last, number = b"", 0
    with open_regular(Path(folder) / FILE) as file:
        for at, line in enumerate(iter(partial(file.readline, MOST + 1), b""), 1):
            if line.strip():
                last, number = line, at
    return None if not last or _parse(last) is not None else _torn(Path(folder) / FILE, number, last)


def _torn(path: Path, number: int, line: bytes) -> str:
    came = line[:40].decode(errors="replace")
    return f"{path}, line {number}: expected a JSON object, got {came!r}; remove the line"


def records_upto(folder: str | Path, step: int) -> Iterator[dict[str, Any]]:
    """Records of a run folder up to and including a step; those without a step or seconds are passed over.

    Raises:
        UserError: as `read_history`.
    """
    return (record for record in iter_history(folder) if _is_upto(record, step))


def unbroken_upto(folder: str | Path, step: int) -> Iterator[dict[str, Any]]:
    """The records of steps 1 to `step` of a run that records every step; what comes after them is not looked at.

    Raises:
        UserError: as `read_history`, or one of them is missing or in another one's place.
    """
    path = Path(folder) / FILE
    records = iter_history(folder) if step and path.exists() else iter(())
    for wanted in range(1, step + 1):
        record = next(records, None)
        if record is None or not _is_upto(record, wanted) or record["step"] != wanted:
            came = "none" if record is None else f"that of step {record.get('step')!r:.20}"
            mend = (
                f"restore the file, or remove the checkpoints after step {wanted - 1}: then --resume makes them again"
            )
            raise UserError(f"{path}: expected the record of step {wanted}, got {came}; {mend}")
        yield record


class Recorder:
    """Appends records to an open run folder; made by `open_recorder`, used as a context manager or closed by hand."""

    def __init__(self, file: Any, loggers: Loggers | None = None) -> None:
        self._file, self._loggers = file, loggers

    def write(self, step: int, tokens: int, seconds: float, metrics: Any) -> dict[str, Any]:
        """Append the record of one step and return it.

        Args:
            step: number of the step; tokens: trained on so far; seconds: of training so far.
            metrics: a NamedTuple or mapping, as `to_record` takes it.

        Raises:
            UserError: the disk refuses.
        """
        progress = int(step), int(tokens), round(float(seconds), 3)
        record = dict(zip(PROGRESS, progress, strict=True)) | to_record(metrics)
        try:
            self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
            self._file.flush()  # a killed process loses no whole record
        except OSError as error:
            raise self._refused(error) from error
        if self._loggers is not None:
            self._loggers.log(record["step"], record)
        return record

    def sync(self) -> None:
        """Wait until every record so far is on the disk.

        Raises:
            UserError: the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._file.name}: the disk refused it: {error.strerror}; free space, then --resume")

    def close(self) -> None:
        """Close the record, and wait for the loggers; closing twice does nothing."""
        self._file.close()
        if self._loggers is not None:
            self._loggers.finish()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_recorder(
    folder: str | Path,
    *,
    resume_step: int | None = None,
    loggers: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Recorder:
    """Open the record of a run for appending.

    Args:
        folder: run folder, made if need be.
        resume_step: None starts a record; a number keeps the records up to and including that step and drops what
            came after it, so that a resumed run leaves no gap and nothing twice.
        loggers: names of those of `training.storage.loggers` that see the records, too.
        settings: of the run, for loggers that show them.

    Raises:
        UserError: a fresh record is asked for where one is already, or the old record cannot be read.
    """
    folder = Path(folder)
    make_folder(folder)
    path = folder / FILE
    if resume_step is None and path.exists() and path.stat().st_size:
        raise UserError(f"{path}: expected no record of an earlier run, found one; use --resume or another --out")
    if resume_step is not None and path.exists():
        rewrite_records(folder, unbroken_upto(folder, resume_step))
    file = path.open("a", encoding="ascii")
    flush(folder)  # the name, too, must be there after a power cut
    return Recorder(file, Loggers(loggers, LoggedRun(folder, settings or {}, resume_step)) if loggers else None)


def no_recorder() -> Recorder:
    """Recorder that keeps nothing, for a process whose records another process writes."""
    return Recorder(open(os.devnull, "a", encoding="ascii"))


def _is_upto(record: Mapping[str, Any], step: int) -> bool:
    return type(record.get("step")) is int and record["step"] <= step and isinstance(record.get("seconds"), int | float)


def rewrite_records(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace all records by these in one move: a killed process leaves the old file or the new one."""
    lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    write_text(folder / FILE, "".join(lines))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _nested(numbers: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
    """The next numbers as nested lists of a shape, in the kind of numbers of their own tensor."""
    digits = TABLE_DIGITS if shape else SCALAR_DIGITS
    kind = bool if dtype == torch.bool else float if dtype.is_floating_point else int

    def fill(axes: tuple[int, ...]) -> Any:
        return [fill(axes[1:]) for _ in range(axes[0])] if axes else _plain(kind(next(numbers)), digits)

    return fill(tuple(shape))


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return [_plain(item, TABLE_DIGITS) for item in value] if isinstance(value, list | tuple) else value
