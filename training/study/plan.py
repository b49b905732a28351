"""Groups of runs that train in one vmapped program: alike in all static settings, sized to fit the memory."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil

from tiny_onn_func.params import count_params
from tiny_onn_func.tree import flatten
from training.errors import UserError
from training.run.config import DEFAULT_HYPER, RunConfig, plain_values
from training.storage.atomic import make_folder, write_text
from training.storage.regular_file import read_small
from training.study.config import StudyRun

MOST_AT_ONCE = 64
BUSY = 1 << 22  # tokens * width * layers of a step, beyond which more runs gain little (docs/benchmarks.md)
MEMORY_SHARE = 0.5  # of what is available
PLAN, NAME = "plan.json", re.compile(r"group_\d{3,}")  # a group's name is that of a folder, which goes in the end
COMPARED = "compared.json"  # plan of the runs at the values that the tuning chose
AT_ONCE = "runs_at_once"


class Group(NamedTuple):
    """Runs that train in one vmapped program; all have the same static settings."""

    name: str
    runs: list[StudyRun]


def static_part(config: RunConfig) -> RunConfig:
    """A run's settings without what vmap maps: the numbers of the hyper step, the seed, and what is in its batches."""
    alpha = 0.0 if config.teacher is None else 1.0  # a teacher wants one
    hyper = DEFAULT_HYPER._replace(distill_alpha=alpha)
    return replace(config, hyper=hyper, seed=0, out=None, replay=0.0)


def check_alike(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that cannot share a program; the message names the static key that differs."""
    first, *others = (flatten(plain_values(static_part(config))) for config in configs)
    for key, value in first.items():
        for other in others:
            if other[key] != value:
                raise UserError(
                    f"{key}: expected one value in a vmapped group, got {value!r} and {other[key]!r}; seeds, replay "
                    "and numbers of hyper may differ there, all else wants its own group, as plan_groups makes them"
                )


def plan_groups(runs: list[StudyRun], runs_at_once: int | None = None, first: int = 0) -> list[Group]:
    """Group the runs by their static part, in order of appearance, and split what is too large into equal groups.

    Args:
        runs_at_once: most runs of a group; None takes what memory allows and speeds them up, at most MOST_AT_ONCE.
        first: number in the name of the first group.
    """
    if runs_at_once is not None and runs_at_once < 1:
        raise UserError(
            f"--runs-at-once: expected 1 or more, got {runs_at_once}; leave it away for an automatic choice"
        )
    by_config: dict[RunConfig, list[StudyRun]] = {}
    for run in runs:
        by_config.setdefault(static_part(run.config), []).append(run)
    groups: list[Group] = []
    for config, members in by_config.items():
        most = runs_at_once or _fitting(config)
        size = math.ceil(len(members) / math.ceil(len(members) / most))
        for start in range(0, len(members), size):
            groups.append(Group(f"group_{first + len(groups):03d}", members[start : start + size]))
    return groups


def save_plan(groups: list[Group], folder: Path, runs_at_once: int | None = None, name: str = PLAN) -> None:
    """Write which run is in which group: a resumed study must map the same runs together."""
    make_folder(folder)
    asked = {} if runs_at_once is None else {AT_ONCE: runs_at_once}
    text = json.dumps({**asked, **{group.name: [run.id for run in group.runs] for group in groups}}, indent=1)
    write_text(folder / name, text + "\n")


def planned_at_once(folder: Path) -> int | None:
    """The `runs_at_once` with which a study was begun."""
    asked = json.loads(read_small(folder / PLAN)).get(AT_ONCE)
    return asked if isinstance(asked, int) and asked > 0 else None


def load_plan(runs: list[StudyRun], folder: Path, name: str = PLAN) -> list[Group]:
    """The groups of a study that was begun.

    Raises:
        UserError: the plan is missing, damaged, or not of these runs.
    """
    by_id = {run.id: run for run in runs}
    try:
        plan = json.loads(read_small(folder / name))
        groups = [Group(group, [by_id.pop(run) for run in ids]) for group, ids in plan.items() if NAME.fullmatch(group)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        groups = []
    if by_id or not groups:
        raise UserError(
            f"{folder / name}: expected the plan of this study's runs, got another or none; name a new --out"
        )
    for group in groups:
        try:
            check_alike([run.config for run in group.runs])
        except UserError as error:
            raise UserError(f"{folder / name}: {error}") from None
    return groups


def memory_of_a_run(config: RunConfig) -> int:
    """Bytes that one run needs in a step, estimated: states before and after it, gradients, saved activations."""
    model = config.model
    tokens = config.batch_size // config.accumulate * config.sequence_length
    rows = tokens * model.routes_per_token
    heads = model.num_attention_heads
    a_layer = tokens * (12 * model.hidden_size + 6 * heads * model.head_dim + 3 * heads * config.sequence_length)
    a_layer += rows * (7 * model.moe_intermediate_size + 3 * model.hidden_size) + 8 * tokens * model.num_experts
    taught = 4 if config.teacher is not None else 0
    activations = model.num_hidden_layers * a_layer + (6 + taught) * tokens * model.vocab_size
    return 4 * (8 * count_params(model) + 2 * activations)


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
    except OSError:  # no control group
        return available
    return available if limit.strip() == "max" else max(0, min(available, int(limit) - int(used)))


def _fitting(config: RunConfig) -> int:
    work = config.batch_size * config.sequence_length * config.model.hidden_size * config.model.num_hidden_layers
    fitting = int(MEMORY_SHARE * available_memory() / memory_of_a_run(config))
    return max(1, min(MOST_AT_ONCE, BUSY // work, fitting))
