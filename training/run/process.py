"""SIGINT and SIGTERM: stop at once if one process has the whole state, between two steps if it is sharded."""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from tiny_onn_func.kernels import build
from tiny_onn_func.kernels.runtime import divide_threads, loaded
from training.run.config import RunConfig

POLITE = (signal.SIGINT, signal.SIGTERM)


def stop_politely() -> None:
    """Turn SIGINT and SIGTERM into a KeyboardInterrupt, after which a checkpoint is saved; the second ends at once."""

    def stop(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in POLITE:
        signal.signal(number, stop)


@contextmanager
def deferred_signals(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Defer SIGINT and SIGTERM: yield a function that is True once one came; at the end raise KeyboardInterrupt if so.

    A process that left in the middle of a step would take its part of the state with it. The second signal does so.

    Args:
        wanted: False leaves all as it is, and nothing is ever asked.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        asked.append(number)

    before = {number: signal.signal(number, note) for number in POLITE} if wanted else {}
    try:
        yield lambda: bool(asked)
        if asked:
            raise KeyboardInterrupt
    finally:
        for number in before.keys() - {*asked}:
            signal.signal(number, before[number])


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's numbers, from malloc.h
_NEVER = -1


def disable_heap_trimming() -> bool:
    """Make glibc keep freed blocks instead of returning them to the kernel; True if it was done.

    By default every block above some hundred kilobytes goes back when it is freed, and the next step pays a page fault
    for each 4 KiB that it touches again. The process then stays as large as its largest step.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt  # noqa: TID251 - the C library of this process
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


SMALL_STEP = 1 << 20  # numbers of a hidden state up to which the kernels alone have threads


def use_threads(number: int, config: RunConfig, device: torch.device) -> None:
    """Set the threads of this process: `number`, or as many as PyTorch has chosen if it is 0.

    Of small steps that kernels compute, PyTorch's own operations keep one thread (docs/benchmarks.md).
    """
    number = number or torch.get_num_threads()
    numbers = config.batch_size * config.sequence_length * config.model.hidden_size
    computed = device.type == "cpu" and config.precision != "bfloat16" and build.library() is not None
    if computed and numbers <= SMALL_STEP and config.teacher is None and loaded().has_own_threads():
        divide_threads(number)
    else:
        torch.set_num_threads(number)
