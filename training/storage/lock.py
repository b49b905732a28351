"""Folder lock: a second process is refused by name. A lock ends with its process, so none can be stale.

The lock is the operating system's, by filelock on FOLDER/.lock; FOLDER/.lock-holder says whose it is. A process that
dies, however it dies, holds nothing any more: files without a living holder are no lock, and are taken over.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from training.errors import UserError
from training.storage.atomic import make_folder
from training.storage.regular_file import read_small

LOCK, HOLDER = ".lock", ".lock-holder"
POLL = 0.2  # seconds


@contextmanager
def locked(folder: str | Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock, making the folder if need be; one that was made here and stays empty is removed again.

    Args:
        patience: seconds to wait for another process to end.

    Raises:
        UserError: another process holds it; the message says which.
    """
    home = Path(folder)
    created = [path for path in (home, *home.parents) if not path.exists()]
    make_folder(home)
    lock = _lock(home)
    try:
        try:
            lock.acquire(timeout=patience, poll_interval=POLL)
            while not _is_at(lock, home / LOCK):  # its holder removed the file between our opening and our locking
                lock.release()
                lock.acquire(timeout=patience, poll_interval=POLL)
        except Timeout:
            raise UserError(
                f"{home}: expected a folder at rest, got one in use by {_name(home)}; end it or wait"
            ) from None
        try:
            (home / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            for name in (HOLDER, LOCK):  # while it is held: none of another process can be removed
                with suppress(OSError):  # Windows keeps a file that is open
                    (home / name).unlink()
            lock.release()
    finally:
        for path in created:
            try:
                path.rmdir()
            except OSError:
                break


def holder(folder: str | Path) -> str | None:
    """Name of the process that holds the folder: "process 123 on host"; None if none does."""
    home = Path(folder)
    if not (home / LOCK).exists():
        return None
    try:
        with _lock(home).acquire(timeout=0):
            return None
    except Timeout:
        return _name(home)
    except OSError:
        return None


def _lock(home: Path) -> FileLock:
    return FileLock(home / LOCK, mode=0o644)


def _is_at(lock: FileLock, path: Path) -> bool:
    """True if the file that is locked is the one at the path."""
    descriptor = lock._context.lock_file_fd  # no public name (filelock 4.3)
    try:
        return descriptor is None or os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _name(home: Path) -> str:
    try:
        return read_small(home / HOLDER, 200).decode(errors="replace").strip() or "another process"
    except OSError:
        return "another process"
