"""A run's scalars for TensorBoard: an event a step, written at once, by the package's own record format."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.terminal import LOG


class TensorBoardLogger:
    """Appends events to a new file in a folder. When the disk refuses, it says so once and keeps still."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """
        Args:
            folder: where TensorBoard looks, made if need be.
            purge_step: the first step that is written; TensorBoard hides what earlier files say from there on.

        Raises:
            ImportError: the package tensorboard cannot be used.
            OSError: the disk refuses.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary = event_pb2, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file: Any = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=purge_step, session_log=start)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """All scalars of a step as one event."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._file is not None:
            with suppress(OSError):  # what the disk has refused already
                self._file.close()
            self._file = None

    def _write(self, **content: Any) -> None:
        if self._file is None:
            return
        try:
            self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except OSError as error:
            LOG.warning("warning: %s: %s; no more TensorBoard from here on", self._file.name, error.strerror)
            self.close()
