"""Files that survive a power cut: flushed as a draft, renamed, then the folder's list of names flushed, too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all; the file that it replaces stays until then.

    Raises:
        OSError: the disk refuses; no draft is left.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """As `write_text`."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.tmp")
    try:
        with _naming(target), draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush(target.parent)


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to an error of a write or a flush, which lacks it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents, their names flushed to the disk; does nothing if it is there.

    Raises:
        UserError: it, or a parent, is a file.
    """
    folder = Path(path)
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder}: expected a folder, got a file; name another one")
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def cache_folder() -> Path:
    """Folder for files that can be made again from texts and teachers: $TINY_ONN_CACHE, else the system's own place.

    On Linux that is $XDG_CACHE_HOME/tiny-onn, or ~/.cache/tiny-onn.

    Raises:
        UserError: neither names one.
    """
    from platformdirs import user_cache_path  # of the extra `lab`; the rest of this file does without

    try:
        return Path(os.environ.get("TINY_ONN_CACHE") or user_cache_path("tiny-onn", appauthor=False)).expanduser()
    except RuntimeError:
        raise UserError(
            "TINY_ONN_CACHE: expected a folder, got none, and this user has no home folder; set it"
        ) from None
