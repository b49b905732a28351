"""Loggers of a run, chosen by name: each in a thread with a bounded queue, so that none stops or slows a step.

    tensorboard   RUN/tensorboard, by torch's SummaryWriter
    csv           RUN/metrics.csv, a column a number
    trackio       Hugging Face's tracker, local unless its own variables name a Space
    wandb         Weights & Biases; $WANDB_MODE=offline keeps everything on this machine

The record of a run is metrics.jsonl, whatever becomes of these views of it.
"""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from queue import Queue
from threading import Thread

from training.errors import UserError
from training.storage.csv_logger import CsvLogger
from training.storage.hosted_logger import HostedLogger
from training.storage.logger import LoggedRun, Logger, Record
from training.storage.tensorboard import TensorBoardLogger
from training.terminal import LOG

LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CsvLogger,
    "trackio": lambda: HostedLogger("trackio"),
    "wandb": lambda: HostedLogger("wandb"),
}
NONE = "none"
HOSTED = ("trackio", "wandb")  # packages that no other extra brings
MOST_WAITING = 1024  # records that a logger may be behind
PATIENCE = 30.0  # seconds that the end of a run waits for its loggers, all together


def logger_names(text: str | None) -> tuple[str, ...] | None:
    """`csv,wandb` -> the names in it; `none` (null in YAML) -> no name; None if one is unknown or there twice."""
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if names == (NONE,):
        return ()
    return names if set(names) <= LOGGERS.keys() and len(set(names)) == len(names) else None


def check_installed(names: Sequence[str]) -> None:
    """Refuse a logger whose package is not there; without TensorBoard, the default, a run only warns.

    Raises:
        UserError: the line names the package.
    """
    for name in names:
        if name in HOSTED and find_spec(name) is None:
            raise UserError(f"log: expected the package {name}, found none; pip install {name}, or leave it away")


class Loggers:
    """The loggers of a run at work; `log` returns at once, `finish` waits for them."""

    def __init__(self, names: Sequence[str], run: LoggedRun) -> None:
        self._workers = [_Worker(name, LOGGERS[name](), run) for name in names]

    def log(self, step: int, record: Record) -> None:
        """Hand a record to all; one that is too far behind drops it."""
        for worker in self._workers:
            worker.log(step, record)

    def finish(self) -> None:
        """Wait until all is logged, up to PATIENCE; say what was dropped. A second call does nothing."""
        workers, self._workers = self._workers, []
        until = time.monotonic() + PATIENCE
        for worker in workers:
            worker.begin_end()
        for worker in workers:
            worker.end(until)


class _Worker:
    """A logger in its own thread."""

    def __init__(self, name: str, logger: Logger, run: LoggedRun) -> None:
        self._name, self._logger, self._run = name, logger, run
        self._queue: Queue[tuple[int, Record] | None] = Queue(MOST_WAITING + 1)  # a place for the end
        self._dropped, self._is_off = 0, False
        self._thread = Thread(target=self._work, name=f"log {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Record) -> None:
        if self._is_off:
            return
        if self._queue.qsize() >= MOST_WAITING:
            self._dropped += 1
        else:
            self._queue.put_nowait((step, record))

    def begin_end(self) -> None:
        if not self._is_off:
            self._queue.put_nowait(None)

    def end(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        late = max(0, self._queue.qsize() - 1) if self._thread.is_alive() else 0
        if self._thread.is_alive():
            LOG.warning(
                "warning: %s is still busy %d s after the last step: %d records are not there; metrics.jsonl has all",
                self._name, PATIENCE, self._dropped + late,
            )  # fmt: skip
        elif self._dropped and not self._is_off:
            LOG.warning(
                "warning: %s was slower than the steps: %d records were dropped; metrics.jsonl has all",
                self._name, self._dropped,
            )  # fmt: skip

    def _work(self) -> None:
        try:
            self._logger.start(self._run)
            while (item := self._queue.get()) is not None:
                self._logger.log(*item)
            self._logger.finish()
        except BaseException as error:  # a library may even end the interpreter
            self._is_off = True
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            LOG.warning("warning: no more %s from here on (%s); metrics.jsonl is kept all the same", self._name, reason)
