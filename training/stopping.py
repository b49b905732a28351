"""Ctrl-C and a polite kill: at once where one process has the whole state, between two steps where many share it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

POLITE = (signal.SIGINT, signal.SIGTERM)


def stop_politely() -> None:
    """Ctrl-C and a polite kill raise KeyboardInterrupt, of which a checkpoint is saved; the second leaves at once."""

    def stop(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in POLITE:
        signal.signal(number, stop)


@contextmanager
def held_back(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether to stop has been asked, which raises nothing inside; at the end it does, if nobody has acted on it.

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
