"""A run's scalars and histograms for trackio or wandb, which share init, log, finish and Histogram."""

import os
import re
import secrets
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.storage.atomic import write_text
from training.storage.logger import LoggedRun, Record, arrays, scalars
from training.storage.regular_file import read_small

ID, FORM = ".log-id", re.compile(r"[0-9a-f]{12}")  # RUN/.log-id: under which a resumed run is found again
PROJECT = "tiny-onn"


@dataclass
class HostedLogger:
    """Logger for the library of that name; the project is $WANDB_PROJECT, $TRACKIO_PROJECT, else `tiny-onn`."""

    name: str

    def start(self, run: LoggedRun) -> None:
        """Begin a run there, or go on with it, with the settings as its configuration."""
        self._library, identity = _library(self.name), _identity(run)
        own: dict[str, Any] = {"name": f"{run.folder.name}-{identity}", "embed": False}
        if self.name == "wandb":
            settings = self._library.Settings(console="off", silent=True)
            own = {"name": run.folder.name, "id": identity, "dir": str(run.folder), "settings": settings}
        project = os.environ.get(f"{self.name.upper()}_PROJECT") or PROJECT
        with redirect_stdout(sys.stderr):  # standard output is for results
            self._run = self._library.init(project=project, config=dict(run.settings), resume="allow", **own)
        self._first = int(getattr(self._run, "step", 0)) if run.resume_step is not None else 0  # wandb has those before

    def log(self, step: int, record: Record) -> None:
        """Log all scalars and, every some steps, histograms of the tables; steps already logged are skipped."""
        if step < self._first:
            return
        tables = {name: self._library.Histogram(entries) for name, entries in arrays(step, record).items()}
        self._run.log({**scalars(record), **tables}, step=step)

    def finish(self) -> None:
        """Wait until the library has all."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


def _library(name: str) -> Any:
    if name == "wandb":
        import wandb

        return wandb
    import trackio

    return trackio


def _identity(run: LoggedRun) -> str:
    """The run's name among all others, kept in its folder."""
    path: Path = run.folder / ID
    if run.resume_step is not None:
        try:
            known = read_small(path, 100).decode("ascii", errors="replace").strip()
        except OSError:
            known = ""
        if FORM.fullmatch(known):
            return known
    new = secrets.token_hex(6)
    write_text(path, new + "\n")
    return new
