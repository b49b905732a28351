"""Follow a growing record: the records that came since the last look, by a byte offset into metrics.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import UserError
from training.storage.recorder import FILE
from training.storage.regular_file import MOST, open_regular

BATCH = 256  # records that are in memory at once


class Cursor(NamedTuple):
    """Place in a record up to which it was read."""

    offset: int = 0  # bytes
    lines: int = 0
    inode: int = 0  # of the file: a resumed run replaces it


class Batch(NamedTuple):
    """Some records in a row."""

    records: list[dict[str, Any]]
    cursor: Cursor  # behind them
    restarted: bool  # these are the first ones: forget what came before


def follow(folder: str | Path, cursor: Cursor) -> Iterator[Batch]:
    """Records of a run folder behind a cursor, in batches; none where there is no file yet.

    A record that was replaced or cut since is read from its first line. A torn last line is left for the next look.

    Raises:
        UserError: a line before the last is no JSON object.
    """
    path = Path(folder) / FILE
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        status = os.fstat(file.fileno())
        restarted = status.st_ino != cursor.inode or status.st_size < cursor.offset
        offset, lines = (0, 0) if restarted else cursor[:2]
        file.seek(offset)
        records: list[dict[str, Any]] = []
        torn = ""  # what is wrong with the last line, if something is
        while line := file.readline(MOST + 1):
            if torn and line.strip():
                raise UserError(torn)
            record = _parse(line) if line.strip() else {}
            if record is None:
                came = line[:40].decode(errors="replace")
                torn = f"{path}, line {lines + 1}: expected a JSON object, got {came!r}; remove the line"
            if torn:
                continue
            offset, lines = offset + len(line), lines + 1
            records += [record] if record else []
            if len(records) == BATCH:
                yield Batch(records, Cursor(offset, lines, status.st_ino), restarted)
                records, restarted = [], False
        if records or restarted:
            yield Batch(records, Cursor(offset, lines, status.st_ino), restarted)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None) if len(line) <= MOST else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
