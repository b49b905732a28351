"""A run's scalars and histograms for TensorBoard, by torch's SummaryWriter: one summary a step."""

import threading
from typing import Any

import numpy as np

from training.storage.logger import LoggedRun, Record, arrays, scalars

UNSHOWN = ("tokens", "seconds")  # which grow by the step


class TensorBoardLogger:
    """Logger that writes RUN/tensorboard; of steps that are made again TensorBoard hides the earlier ones."""

    def start(self, run: LoggedRun) -> None:
        """
        Raises:
            ImportError: the package tensorboard cannot be used.
            OSError: the disk refuses.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import histogram

        histogram_of: Any = histogram  # it has no types
        self._summary, self._histogram, self._hook = Summary, histogram_of, threading.excepthook
        threading.excepthook = self._silence
        purge_step = None if run.resume_step is None else run.resume_step + 1
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, record: Record) -> None:
        """One summary of all scalars and, now and then, of the tables."""
        shown = {name: value for name, value in scalars(record).items() if name not in UNSHOWN}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        for name, entries in arrays(step, record).items():
            values.extend(self._histogram(name, np.array(entries), self._writer.default_bins).value)
        self._writer.file_writer.add_summary(self._summary(value=values), step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        try:
            self._writer.close()
        finally:
            if threading.excepthook == self._silence:
                threading.excepthook = self._hook

    def _silence(self, args: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's own thread: the next call raises the same error."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)
