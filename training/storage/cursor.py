"""Follow a growing record: the records that came since the last look, by a byte offset into metrics.jsonl."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.storage.recorder import FILE, parsed_lines
from training.storage.regular_file import open_regular

BATCH = 256  # records that are in memory at once


class Cursor(NamedTuple):
    """Place in a record up to which it was read."""

    offset: int = 0  # bytes
    lines: int = 0
    inode: int = 0  # of the file: a resumed run replaces it


class Batch(NamedTuple):
    """Consecutive records of metrics.jsonl that one look has read."""

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
        for size, record in parsed_lines(file, path, lines + 1):
            offset, lines = offset + size, lines + 1
            records += [record] if record else []
            if len(records) == BATCH:
                yield Batch(records, Cursor(offset, lines, status.st_ino), restarted)
                records, restarted = [], False
        if records or restarted:
            yield Batch(records, Cursor(offset, lines, status.st_ino), restarted)
