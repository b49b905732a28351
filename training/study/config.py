"""StudyConfig: the definition of a study, checked when it is made, and the list of runs that follows from it.

    study = StudyConfig(
        "rates", margin=0.02, base=RunConfig(steps=200), seeds=(0, 1, 2),
        arms=(Arm("surprise"), Arm("frozen", {"hyper.router_lr": 0.0})),
    )
    runs = expand(study)  # six of them

An arm is a named set of changes to `base`; axes are keys with values that every arm goes through. Keys are dotted as in
YAML and flags: hyper.lr, model.num_experts, data.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from tiny_onn_func.tree import flatten
from training.data.hf_tokenizer import vocab_follows
from training.errors import UserError
from training.ranges import Range, out_of_range, ranges_of
from training.run.config import PLAIN_MODEL, RunConfig, plain_values
from training.run.settings import sizes_follow
from training.storage.typed import typed
from training.suggest import advice

Values = Mapping[str, Any]  # dotted key -> value
QUICK_PARTS: dict[str, Any] = {  # of a study that its short version may change, beside the base, and their types
    "seeds": Sequence[int],
    "tune_seeds": Sequence[int],
    "arms": Sequence[str],
    "axes": Values,
    "orders": Sequence[Sequence[str]],
}
NOT_NOTHING = Range("more than 0 nats per token", {"exclusiveMinimum": 0}, "set it before the runs")
EVERY = Range("1 or more", {"minimum": 1}, "1 records every step")
TOKENS = Range("0 or more", {"minimum": 0}, "0 leaves it out")
UNUSED = {  # settings that mean nothing in a study, and what to write instead
    "seed": "give `seeds: [0, 1, 2]` beside base",
    "out": "name the study's folder with --out",
    "threads": "set it in base; all runs share the processor",
    "tokenizer": "set it in base; arms are compared by nats per token, which are of different tokens otherwise",
    "compile": "a study's runs share programs, one for each group of static settings",
    "init": "set it in base; all runs start from the same weights, seeds differ in the order of the batches",
    **dict.fromkeys(("shard_optimizer", "shard_experts"), "torchrun reads it, for one run on many processes"),
    "teacher_cache": "a study asks its teacher once for runs that see the same batch",
    **dict.fromkeys(("picture_every", "sample_tokens", "prompt", "keep_checkpoints"), "a study has none"),
    "stop_when": "the runs of a group end together, after as many steps",
}
OF_ROUTER = (  # numbers that mean nothing where no layer has a router
    "hyper.router_lr",
    "hyper.surprise_weight",
    "hyper.balance_weight",
    "hyper.z_weight",
    "hyper.router_coupling",
    "hyper.target_temperature",
)
IN_BASE = ("threads", "tokenizer", "init")
WITHOUT = (
    "compile",
    "shard_optimizer",
    "shard_experts",
    "stop_when",
)  # which would decide how a single run is computed


@dataclass(frozen=True)
class Arm:
    """A named set of changes to the base."""

    name: str
    """Name of the arm in tables, figures and folders."""
    set: Values = field(default_factory=dict)
    """Dotted key -> value of each setting that differs from the base."""


@dataclass(frozen=True)
class StudyConfig:
    """Question of a study, the runs that it compares, and the result that would settle it.

    Raises:
        UserError: something is unknown, empty, doubled or out of range; the message names the key and the mend.
    """

    name: str
    """Of the study; by default that of its file."""
    margin: Annotated[float, NOT_NOTHING]
    """Nats per token; differences smaller than this count as none. Set before the runs are made."""
    question: str = ""
    """One sentence, for the report."""
    falsifier: str = ""
    """The result that would settle it, one sentence for the report."""
    base: RunConfig = field(default_factory=lambda: RunConfig(model=PLAIN_MODEL))
    """The run that arms and axes change. What a file leaves out is as in `tiny-onn train`, but for the model, which is
    the plain one: a router of the hidden state and no tables."""
    arms: Sequence[Arm] = ()
    """None means one arm that changes nothing."""
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Dotted key -> values that every arm takes."""
    combine: Literal["grid", "zip"] = "grid"
    """`grid`, all combinations of the axes, or `zip`, their first values together, then their second ones."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Name -> text (as `data`) of the tasks of a stream, each for the same number of steps; none for one text."""
    orders: Sequence[Sequence[str]] = ()
    """Names of all tasks in the order in which they are learned; every arm goes through all orders with every seed, and
    arms are compared pair by pair of seed and order. None means the order of `tasks`."""
    tune: Sequence[str] = ()
    """Axes of which each arm takes the value with the best mean score, instead of being reported at each. An arm that
    sets such a key itself keeps its own value, and is tuned on the other axes alone."""
    tune_seeds: Sequence[int] = ()
    """Seeds whose runs alone choose those values, before those of `seeds` are made at the chosen values alone; none of
    `seeds`. Without them the runs that are compared choose as well, which finds differences that are luck, so that p
    is multiplied by all that was tried."""
    seeds: Sequence[int] = ()
    """Of parameters and batches; arms are compared seed by seed."""
    baseline: str = ""
    """The arm that others are compared with; "" is the first one."""
    record_every: Annotated[int, EVERY] = 1
    """Steps between two records in a run's metrics.jsonl."""
    analysis_tokens: Annotated[int, TOKENS] = 64
    """Held-out tokens a layer on which each finished run's router is compared with the counterfactual oracle; 0 leaves
    out all that `training.study.routing_analysis` says."""
    atlas_tokens: Annotated[int, TOKENS] = 0
    """Held-out tokens on which each finished run's token atlas is measured: the signed benefit of every token id's
    experts, in token_atlas.csv and in the report, and the share of its variance that the token id explains. 8192 cost
    as much as some 6 steps of 12 x 64 tokens; 0 leaves it out."""
    quick: Values = field(default_factory=dict)
    """Changes for a short version of the study: `seeds`, `tune_seeds`, `axes`, `orders`, `arms` (names), and keys of
    base."""

    def __post_init__(self) -> None:
        for key, hint in KEYS.items():
            typed(hint, getattr(self, key), key)
        if wrong := out_of_range(self, RANGES):
            raise UserError(wrong)
        _require(len(self.seeds) > 0, "seeds", "at least one seed", self.seeds, "five make intervals: [0, 1, 2, 3, 4]")
        _refuse_doubles(self.seeds, "seeds")
        _refuse_doubles([arm.name for arm in self.arms], "arms")
        looked_at = bool(self.analysis_tokens) or not self.atlas_tokens
        _require(looked_at, "atlas_tokens", "0 without analysis_tokens", self.atlas_tokens, "give both, or neither")
        _check_keys(self)
        _check_tuning(self)
        _check_tasks(self)
        labels = [run.arm for run in expand(self)]
        known = [*dict.fromkeys([*(arm.name for arm in self.arms), *labels])]
        if self.baseline and self.baseline not in known:
            raise UserError(f"baseline: expected an arm ({', '.join(known)}), got {self.baseline!r}; name one of them")


KEYS = {key: hint for key, hint in get_type_hints(StudyConfig, include_extras=True).items() if key != "base"}
RANGES = ranges_of(StudyConfig)


class Cell(NamedTuple):
    """One arm at one point of the axes: runs of all seeds, or of those of the tuning alone until it is chosen."""

    arm: str  # its own name
    label: str  # of arm and axes, without what is tuned: the name under which it is compared
    point: dict[str, Any]  # values of the axes, without those that the arm sets itself
    config: RunConfig


class StudyRun(NamedTuple):
    """One run of a study."""

    id: str  # name of its folder
    arm: str  # label of its cell
    overrides: dict[str, Any]  # every key that some arm or axis sets -> this run's value
    seed: int
    config: RunConfig
    order: tuple[str, ...]  # of its tasks; none in a study of one text
    tuned: dict[str, Any]  # tuned axis of its arm -> this run's value


def expand(study: StudyConfig, chosen: Mapping[str, Values] | None = None) -> list[StudyRun]:
    """All runs: every cell with the first seed and order, then with the next order, then with the next seed.

    With `tune_seeds` the runs of the tuning come first, those seeds at every point. The runs that are compared follow
    once it is known which points were chosen (`training.study.comparison.tuning.choose`): a run for each of `seeds`.

    Args:
        chosen: label -> tuned axis -> value; None before the tuning is done.
    """
    study_cells = cells(study)
    if not study.tune_seeds:
        return _runs(study, study.seeds, study_cells)
    known = chosen or {}
    at = [cell for cell in study_cells if cell.label in known and _tuned(cell, study) == known[cell.label]]
    return [*_runs(study, study.tune_seeds, study_cells), *_runs(study, study.seeds, at)]


def _runs(study: StudyConfig, seeds: Sequence[int], study_cells: Sequence[Cell]) -> list[StudyRun]:
    keys, runs = overridden_keys(study), []
    orders = [(f"-order{number}", tuple(order)) for number, order in enumerate(orders_of(study), 1)] or [("", ())]
    for seed, (mark, order), cell in product(seeds, orders, study_cells):
        tuned = _tuned(cell, study)
        name = " ".join(part for part in (cell.label, _point_text(tuned, study)) if part)
        values = flatten(plain_values(cell.config))
        overrides, config = {key: values[key] for key in keys}, replace(cell.config, seed=seed, out=None)
        runs.append(StudyRun(f"{_slug(name)}{mark}-seed{seed}", cell.label, overrides, seed, config, order, tuned))
    doubled = [name for name, count in Counter(run.id for run in runs).items() if count > 1]
    if doubled:
        raise UserError(f"arms: expected names that differ in letters or digits, got two runs {doubled[0]}; rename one")
    return runs


def cells(study: StudyConfig) -> list[Cell]:
    """Arms times points of the axes.

    Raises:
        UserError: an arm's values are out of range, or two cells are the same run.
    """
    by_config: dict[RunConfig, Cell] = {}
    for arm in study.arms or (Arm(""),):
        for point in _points(study, arm):
            shown = {key: value for key, value in _untuned(point, study).items() if len(study.axes[key]) > 1}
            label = " ".join(part for part in (arm.name, _point_text(shown, study)) if part) or study.name
            place = f"arms.{arm.name}: " if arm.name else "axes: "
            config = changed(study.base, {**arm.set, **point}, place)
            if twin := by_config.get(config):
                came = f"{twin.label!r} and {label!r}" if twin.label != label else f"{label!r} twice"
                raise UserError(f"arms: expected arms that differ, got the same run for {came}; change or remove one")
            by_config[config] = Cell(arm.name, label, point, config)
    return [*by_config.values()]


def orders_of(study: StudyConfig) -> list[list[str]]:
    """The orders of the tasks; none in a study of one text."""
    return [list(order) for order in study.orders] or ([list(study.tasks)] if study.tasks else [])


def overridden_keys(study: StudyConfig) -> list[str]:
    """Every key that an arm or an axis sets, in order of appearance."""
    return [*dict.fromkeys([*(key for arm in study.arms for key in arm.set), *study.axes])]


def baselines_of(study: StudyConfig) -> dict[str, str]:
    """Label -> label that it is compared with: of the baseline, at the same point of the axes."""
    study_cells = cells(study)
    baseline = study.baseline or study_cells[0].arm or study_cells[0].label

    at = [(_untuned(cell.point, study), cell.label) for cell in study_cells if cell.arm == baseline]
    return {
        cell.label: next((label for point, label in at if point == _untuned(cell.point, study)), baseline)
        for cell in study_cells
    }


def study_values(study: StudyConfig) -> dict[str, Any]:
    """The study as plain values for YAML, every default filled in."""
    values = {f.name: getattr(study, f.name) for f in fields(study)}
    base = {key: value for key, value in plain_values(study.base).items() if key not in UNUSED or key in IN_BASE}
    arms = [{"name": arm.name, "set": dict(arm.set)} for arm in study.arms]
    lists = {key: list(values[key]) for key in ("tune", "tune_seeds", "seeds")}
    axes = {key: list(points) for key, points in study.axes.items()}
    lists["orders"] = [list(order) for order in study.orders]
    parts = {"base": base, "arms": arms, "axes": axes, "tasks": dict(study.tasks), "quick": dict(study.quick)}
    return values | lists | parts


def quick_study(study: StudyConfig) -> StudyConfig:
    """The short version that the study's `quick` describes."""
    changes = dict(study.quick)
    if not changes:
        raise UserError("quick: expected what the short version changes, got nothing; add `quick: {steps: 50}`")
    names = changes.pop("arms", [arm.name for arm in study.arms])
    parts = {key: changes.pop(key) for key in ("seeds", "tune_seeds", "axes", "orders") if key in changes}
    for name in names:
        if name not in [arm.name for arm in study.arms]:
            raise UserError(
                f"quick.arms: expected names of arms, got {name!r}{near(name, [a.name for a in study.arms])}"
            )
    if taken := [key for key in changes if key in overridden_keys(study)]:
        raise UserError(f"quick.{taken[0]}: expected a key that no arm or axis sets, got one; remove it here or there")
    arms = [arm for arm in study.arms if arm.name in names]
    return replace(study, base=changed(study.base, changes, "quick: "), arms=arms, quick={}, **parts)


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_keys(study: StudyConfig) -> None:
    known = flatten(plain_values(study.base))
    places = [(f"axes.{key}", key) for key in study.axes]
    places += [(f"arms.{arm.name}.set.{key}", key) for arm in study.arms for key in arm.set]
    places += [(f"quick.{key}", key) for key in study.quick if key not in QUICK_PARTS]
    for place, key in places:
        if key not in known:
            raise UserError(f"{place}: unknown key{near(key, known)}")
        if key in UNUSED:
            raise UserError(f"{place}: expected a setting of a run in a study, got {key}; {UNUSED[key]}")
    for key in WITHOUT:
        wanted = getattr(RunConfig(), key)
        _require(known[key] == wanted, f"base.{key}", f"{wanted} in a study", known[key], UNUSED[key])
    for key, values in study.axes.items():
        _require(len(values) > 0, f"axes.{key}", "at least one value", list(values), "give some, or remove the axis")
        _refuse_doubles(values, f"axes.{key}")
        for arm in study.arms:
            if key in arm.set and key not in study.tune:
                mend = "remove one, or add it to `tune`"
                raise UserError(f"axes.{key}: expected a key that no arm sets, got one of arm {arm.name!r}; {mend}")
    lengths = {key: len(values) for key, values in study.axes.items()}
    if study.combine == "zip" and len({*lengths.values()}) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
        raise UserError(f"axes: expected as many values on each for combine: zip, got {counts}; or combine: grid")


def _check_tuning(study: StudyConfig) -> None:
    for key in study.tune:
        if key not in study.axes:
            raise UserError(f"tune: expected axes ({', '.join(study.axes) or 'there are none'}), got {key!r}")
        values, mend = [*study.axes[key]], "give it more values, or remove it from tune"
        _require(len(values) > 1, "tune", f"axes of two values or more, {key} among them", values, mend)
        if study.arms and all(key in arm.set for arm in study.arms):
            raise UserError(f"tune: expected axes that some arm is tuned on, got {key}, which all arms set; remove one")
        for arm in study.arms:
            _check_effect(study, arm, key)
    _refuse_doubles(study.tune, "tune")
    wanted, mend = "none without tune", "add `tune: [AXIS]`, or remove them"
    _require(bool(study.tune) or not study.tune_seeds, "tune_seeds", wanted, [*study.tune_seeds], mend)
    _refuse_doubles(study.tune_seeds, "tune_seeds")
    for seed in study.tune_seeds:
        wanted, mend = f"other seeds than those that are compared ({', '.join(map(str, study.seeds))})", "take another"
        _require(seed not in study.seeds, "tune_seeds", wanted, seed, mend)


def _check_effect(study: StudyConfig, arm: Arm, key: str) -> None:
    """Refuse to tune what changes nothing in an arm: its runs would be the same ones again and again."""
    if key in arm.set or key not in OF_ROUTER:
        return
    plain = {name: value for name, value in arm.set.items() if name not in study.axes}
    model = changed(study.base, plain, f"arms.{arm.name}: ").model
    if not any(map(model.has_router, range(model.num_hidden_layers))):
        came = f"{key}, which changes nothing where a hash routes"
        mend = f"add `{key}: {study.axes[key][0]}` to its `set`, which keeps it out of the tuning"
        raise UserError(f"arms.{arm.name}: expected tuned axes that matter to it, got {came}; {mend}")


def _check_tasks(study: StudyConfig) -> None:
    names = list(study.tasks)
    if not names:
        _require(not study.orders, "orders", "none without tasks", [*study.orders], "add `tasks: {name: data}`")
        for cell in cells(study):
            wanted = "0 in a study without tasks"
            _require(not cell.config.replay, "replay", wanted, cell.config.replay, "add `tasks: {name: data}`")
        return
    _require(len(names) > 1, "tasks", "two or more", names[0], "add one, or give it as base.data")
    for name, spec in study.tasks.items():
        _require(bool(name and spec), f"tasks.{name}", "a name and what `data` takes", spec, "such as stdlib:re/*.py")
    for number, order in enumerate(study.orders, 1):
        for name in order:
            if name not in names:
                raise UserError(f"orders[{number}]: unknown task {name!r}{near(name, names)}")
        wanted = f"every task once ({', '.join(names)})"
        _require(sorted(order) == sorted(names), f"orders[{number}]", wanted, [*order], "change it")
    _refuse_doubles([[*order] for order in study.orders], "orders")
    if "data" in overridden_keys(study):
        raise UserError("data: expected no arm or axis that sets it beside tasks, got one; remove it")
    for cell in cells(study):
        wanted = f"a multiple of the number of tasks ({len(names)}) for {cell.label}"
        mend = f"take {max(1, cell.config.steps // len(names)) * len(names)}"
        _require(cell.config.steps % len(names) == 0, "steps", wanted, cell.config.steps, mend)


def _require(fine: bool, key: str, wanted: str, came: object, mend: str) -> None:
    if not fine:
        raise UserError(f"{key}: expected {wanted}, got {came!r}; {mend}")


def _refuse_doubles(values: Sequence[Any], key: str) -> None:
    for i, value in enumerate(values):
        _require(value not in values[:i], key, "each only once", value, "remove or rename one")


def near(name: str, known: Collection[str]) -> str:
    """End of a message about an unknown name: the likely one, or all known names."""
    return advice(name, known, f"; known are {', '.join(known)}")


# Points of the axes ---------------------------------------------------------------------------------------------------


def _points(study: StudyConfig, arm: Arm) -> Iterator[dict[str, Any]]:
    """The points of the axes that an arm goes through, which are all but those that it sets itself."""
    axes = {key: values for key, values in study.axes.items() if key not in arm.set}
    combined = product(*axes.values()) if study.combine == "grid" else zip(*axes.values(), strict=True)
    for values in combined if axes else [()]:
        yield dict(zip(axes, values, strict=True))


def _tuned(cell: Cell, study: StudyConfig) -> dict[str, Any]:
    return {key: cell.point[key] for key in study.tune if key in cell.point}


def _untuned(point: Values, study: StudyConfig) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key not in study.tune}


def changed(base: RunConfig, changes: Values, place: str) -> RunConfig:
    """The base with some dotted keys changed."""
    parts: dict[str, dict[str, Any]] = {"": {}, "model": {}, "hyper": {}}
    for key, value in vocab_follows(sizes_follow(changes)).items():
        section, _, name = key.rpartition(".")
        parts[section][name] = value
    try:
        model, hyper = replace(base.model, **parts["model"]), base.hyper._replace(**parts["hyper"])
        return replace(base, model=model, hyper=hyper, **parts[""])
    except ValueError as error:
        raise UserError(f"{place}{error}") from None


def _point_text(point: Values, study: StudyConfig) -> str:
    """{"hyper.lr": 0.001} -> "lr=0.001", with the whole key where two axes end alike."""
    ends = Counter(key.rpartition(".")[2] for key in study.axes)
    short = {key: key.rpartition(".")[2] for key in point}
    return " ".join(f"{short[key] if ends[short[key]] == 1 else key}={value}" for key, value in point.items())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9=._+-]+", "-", text).strip("-.") or "run"
