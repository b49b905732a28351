"""Read untrusted files: regular files only (no pipe, device or link loop), up to a size limit."""

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from training.errors import UserError

MOST = 1 << 24  # bytes of what is read whole, where nobody says otherwise


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A file for reading; a pipe cannot block this, and a device is not touched.

    Raises:
        OSError: no regular file, or one that cannot be read; `filename` and `strerror` say so.
    """
    if not _is_regular(os.stat(path)):  # before it is opened: some devices do things then
        raise _irregular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not _is_regular(os.fstat(descriptor)):  # it changed in between
        os.close(descriptor)
        raise _irregular(path)
    return open(descriptor, "rb")


def read_small(path: str | os.PathLike[str], most: int = MOST) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes, too large for what it should be", str(path))
    return content


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(read_small(path))
        came = type(value).__name__
    except OSError as error:
        value, came = None, str(error.strerror)
    except (ValueError, RecursionError):
        value, came = None, "no JSON"
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {came}; restore the file or remove it")
    return value


def _is_regular(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


def _irregular(path: str | os.PathLike[str]) -> OSError:
    if Path(path).is_dir():
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return OSError(errno.EINVAL, "a pipe or a device, no regular file", str(path))
