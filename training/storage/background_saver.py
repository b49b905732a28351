"""Checkpoints in the background: a step waits for the disk only while the checkpoint before is still being written."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def _give_way() -> None:
    """Let the steps have the processor first; on Linux a thread has a niceness of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class BackgroundSaver:
    """At most one checkpoint in flight; a context manager that ends when it is on the disk.

    A state is a value that no step writes into, so it needs no copy; the writing runs in native code beside the steps.
    What is saved must be ready: torch operations in this thread would slow down those of the steps.
    """

    def __init__(self, write: Callable[..., object]) -> None:
        """`write` makes a checkpoint of what `save` is given, and raises what the disk says."""
        self._write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._pending: Future[object] | None = None

    def save(self, *state: Any) -> None:
        """Begin a checkpoint; raises here what became of the one before."""
        self.wait()
        self._pending = self._thread.submit(self._write, *state)

    def wait(self) -> None:
        """Until nothing is in flight; raises what the writing raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)
