"""Folder lock: a second process is refused by name. A lock ends with its process, so none can be stale.

The lock is the kernel's, on FOLDER/.lock, and the file says whose it is. A process that dies, however it dies, holds
nothing any more: a file without a living holder is no lock, and is taken over.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError
from training.storage.atomic import make_folder

LOCK = ".lock"
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
    try:
        descriptor = _take(home, time.monotonic() + patience)
        try:
            yield
        finally:
            (home / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's can be removed
            os.close(descriptor)
    finally:
        for path in created:
            try:
                path.rmdir()
            except OSError:
                break


def holder(folder: str | Path) -> str | None:
    """Name of the process that holds the folder: "process 123 on host"; None if none does."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name_in(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _name_in(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def _take(home: Path, until: float) -> int:
    """A descriptor that holds the lock; another process may hold it `until` then."""
    path = home / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BlockingIOError:
            who = _name_in(descriptor)
            os.close(descriptor)
            if time.monotonic() < until:
                time.sleep(POLL)
                continue
            raise UserError(f"{home}: expected a folder at rest, got one in use by {who}; end it or wait") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file between our opening and our locking: once more


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
