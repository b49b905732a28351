"""A study's groups as Ray tasks: as many at once as the cluster has processors and memory for.

Every node sees the study's folder, on a file system that all share, which is checked before anything is written. So a
group that was lost with its worker goes on elsewhere from its own checkpoint, and `--resume` works with either
launcher. Rows come back as values, and the driver alone writes results.csv. Ray is imported only when asked for.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.storage.lock import HOLDER
from training.storage.results import Row
from training.study.config import StudyConfig
from training.study.launch import Finished, Launch, Launcher
from training.study.plan import Group, memory_of_a_run
from training.study.ray.session import session
from training.study.ray.worker import Job, Place, check_place, progress_of, train_remotely, versions
from training.terminal import ProgressBar

RETRIES = 3  # of a group whose worker was lost
POLL = 0.5  # seconds between two looks at the tasks
GRACE = 20.0  # seconds in which interrupted workers save their checkpoints
ANSWER = 25.0  # seconds in which every node must have answered
PROCESS_MEMORY = 1 << 29  # bytes of a worker before its first run: Python and torch
KEPT_VARIABLES = ("TINY_ONN_CACHE",)


def ray_launcher(address: str | None = None) -> Launcher:
    """A launcher that hands groups to the Ray cluster at an address, or to a Ray of this machine, ended with the study.

    Args:
        address: HOST:PORT of a cluster's head, or `auto` for the one that this machine belongs to; None takes
            $RAY_ADDRESS, else a Ray of this machine alone.

    Raises (the launcher):
        UserError: Ray is not installed, nothing answers, a node has other versions or does not see the folder.
    """

    @contextmanager
    def launcher(folder: Path) -> Iterator[Launch]:
        with session(address or os.environ.get("RAY_ADDRESS") or None) as ray:
            place = Place(str(folder.resolve()), (folder / HOLDER).read_text(), os.getcwd(), versions())
            _check_nodes(ray, place)
            yield partial(_launch, ray, place)

    return launcher


def _launch(
    ray: Any, place: Place, study: StudyConfig, groups: Sequence[Group], folder: Path, bar: ProgressBar
) -> Finished:
    """All groups at once; Ray starts those for which there is room."""
    before, steps_done = bar.n, dict.fromkeys((group.name for group in groups), 0)
    tasks: dict[Any, Group] = {}
    lost: list[str] = []
    try:
        for group in groups:
            tasks[_submit(ray, place, study, group)] = group
        while tasks:
            ready, _ = ray.wait([*tasks], timeout=POLL)
            for task in ready:
                group = tasks.pop(task)
                if (rows := _rows(ray, task)) is None:
                    lost.append(group.name)
                    continue
                steps_done[group.name] = sum(run.config.steps for run in group.runs)
                yield group, rows
            said = [_look(folder, group, steps_done) for group in tasks.values()]
            running = [text for text in said if text]
            bar.n = before + sum(steps_done.values())
            bar.set_description(f"{len(groups) - len(tasks)}/{len(groups)} groups, {len(running)} running", False)
            bar.set_postfix_str(running[0] if running else "", refresh=True)
    finally:
        _end(ray, [*tasks])
    if lost:
        raise UserError(
            f"{', '.join(lost)}: expected to end, lost {RETRIES + 1} workers each, of memory or of a machine; all "
            f"other groups are done; go on with: tiny-onn study --resume --out {folder}"
        )


def _submit(ray: Any, place: Place, study: StudyConfig, group: Group) -> Any:
    """The group as a task that asks for its threads, its memory, and a device where it computes on one."""
    config = group.runs[0].config
    threads = config.threads or 1  # groups, not threads, fill the processors
    need = PROCESS_MEMORY + len(group.runs) * memory_of_a_run(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = max(node.get("memory", 0) for node in nodes)
    if need > room:
        raise UserError(
            f"{group.name}: expected a node with {need / 2**30:.1f} GiB for its {len(group.runs)} runs, the largest "
            f"has {room / 2**30:.1f}; begin anew with a smaller --runs-at-once"
        )
    cpus = min(threads, max(node.get("CPU", 0) for node in nodes))
    gpus = gpus_of(config.device, max(node.get("GPU", 0) for node in nodes))
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    job = Job(study, group, place, threads, kept)
    task = ray.remote(train_remotely)
    asked = {"num_cpus": cpus, "num_gpus": gpus, "memory": need, "max_retries": RETRIES}
    return task.options(name=group.name, **asked).remote(job)


def gpus_of(device: str, available: int | float) -> int:
    """GPUs that a group asks Ray for: 1 for cuda, or for auto where a node has one; a group without sees none.

    Raises:
        UserError: cuda where no node has a GPU, or a numbered device, as Ray gives every group its own.
    """
    if device.startswith("cuda:"):
        raise UserError(f"device: expected cuda with --launcher ray, which chooses the GPU of each group, got {device}")
    if device == "cuda" and available < 1:
        raise UserError("device: expected cpu or auto, as no node of the Ray cluster has a GPU, got cuda")
    return int(device in ("auto", "cuda") and available >= 1)


def _rows(ray: Any, task: Any) -> list[Row] | None:
    """Rows of a finished task; None if its workers were lost.

    Raises:
        Exception: what the group itself raised.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KeyboardInterrupt):  # Ctrl-C reached the worker first
            raise KeyboardInterrupt from None
        raise (error.cause if isinstance(error.cause, UserError | OSError) else error) from None
    except ray.exceptions.RayError:
        return None


def _look(folder: Path, group: Group, steps_done: dict[str, int]) -> str:
    """Progress of a running group in words, its steps written into `steps_done`; "" before it runs."""
    progress = progress_of(folder, group.name)
    steps_done[group.name] = max(steps_done[group.name], progress.made)
    return progress.said


def _end(ray: Any, tasks: Sequence[Any]) -> None:
    """Interrupt what still runs, as Ctrl-C does here: it saves a checkpoint; what has not begun does not begin."""
    with suppress(Exception):  # a cluster that is lost meanwhile must not hide why this ends
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait([*tasks], num_returns=len(tasks), timeout=GRACE)


def _check_nodes(ray: Any, place: Place) -> None:
    """Check that every node has the driver's versions, and sees its locked folder and working folder."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(check_place)
    asked: dict[Any, Mapping[str, Any]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(*place)] = node
    ready, late = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER)
    names = {task: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for task, node in asked.items()}
    if late:
        raise UserError(f"{names[late[0]]}: expected an answer within {ANSWER:.0f} s, got none; restart the node")
    for task in ready:
        try:
            fault = ray.get(task)
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            fault = f"expected tiny-onn, installed as on {socket.gethostname()}, got: {last}"
        if fault:
            raise UserError(f"node {names[task]}: {fault}")
