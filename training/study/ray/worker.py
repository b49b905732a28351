"""Ray worker: check the node against the driver, train a group, report its progress."""

import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from training.errors import UserError
from training.storage.lock import HOLDER
from training.storage.results import Row
from training.study.config import StudyConfig
from training.study.plan import Group

PROGRESS, EVERY = "progress.json", 0.5  # a group's file beside its checkpoints, and seconds between two versions


class Place(NamedTuple):
    """Folders, lock and versions of the driver, as plain values that any version of this program can read."""

    folder: str  # absolute
    holder: str  # what the lock of the study's folder says
    cwd: str  # relative paths in the study start here
    versions: dict[str, str]


class Job(NamedTuple):
    """Inputs of a group that is trained on another machine."""

    study: StudyConfig
    group: Group
    place: Place
    threads: int
    variables: Mapping[str, str]  # of the environment


class Progress(NamedTuple):
    """Progress of a group."""

    made: int = 0  # steps of all its runs together
    said: str = ""


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    packages = {name: metadata.version(name) for name in ("tiny-onn-func", "torch", "numpy")}
    return {"python": platform.python_version(), **packages}


def check_place(folder: str, holder: str, cwd: str, theirs: Mapping[str, str]) -> str | None:
    """Describe the difference between this node and the driver; None if it sees the same."""
    for name, mine in versions().items():
        if mine != theirs[name]:
            return f"expected {name} {theirs[name]} as on the driver, got {mine}; install the same on every node"
    try:
        shared = (Path(folder) / HOLDER).read_text() == holder
    except OSError:
        shared = False
    if not shared:
        return f"expected to see the study's folder {folder}, got another or none; put --out on a shared file system"
    if not Path(cwd).is_dir():
        return f"expected the working folder {cwd}, found none; start the study from a folder that every node has"
    return None


def train_remotely(job: Job) -> list[Row]:
    """Train a group in this process, as the local launcher would.

    Raises:
        UserError: this node, which may have come after the study began, does not see what the driver sees.
    """
    from training.run.device import choose_device
    from training.run.process import disable_heap_trimming, use_threads
    from training.study.launch import train_group

    folder = Path(job.place.folder)
    if fault := check_place(*job.place):
        raise UserError(f"node {socket.gethostname()}: {fault}")
    os.environ.update(job.variables)
    os.chdir(job.place.cwd)
    disable_heap_trimming()
    config = job.group.runs[0].config
    use_threads(job.threads, config, choose_device(config.device)[0])
    with _Teller(folder, job.group.name) as teller:
        return train_group(job.study, job.group, folder, teller)


def progress_of(folder: Path, name: str) -> Progress:
    """Last progress that a group has written."""
    try:
        progress = json.loads((folder / "checkpoints" / name / PROGRESS).read_text(encoding="utf-8"))
        return Progress(int(progress["made"]), str(progress["said"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Progress()


class _Teller:
    """Progress bar that writes into a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / "checkpoints" / name / PROGRESS
        self._progress = Progress(0, "starting")
        self._told = -EVERY

    def __enter__(self) -> "_Teller":
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def update(self, n: float) -> None:
        self._progress = self._progress._replace(made=self._progress.made + int(n))

    def set_postfix_str(self, s: str, refresh: bool) -> None:
        self._progress = self._progress._replace(said=s)
        now = time.monotonic()
        if refresh or now - self._told >= EVERY:
            self._told = now
            draft = self._path.with_name(f".{PROGRESS}.tmp")  # no flush: it may be lost
            draft.write_text(json.dumps(self._progress._asdict()), encoding="utf-8")
            draft.replace(self._path)
