"""Text -> StudyConfig: the YAML file of a study, every error one line that names the file and the key."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tiny_onn_func.tree import flatten
from training.errors import UserError
from training.presets.find import STUDIES, resolve_preset
from training.run.config import RunConfig
from training.run.settings import checked
from training.storage.plain_yaml import read_yaml, shown, write_yaml
from training.study.config import QUICK_PARTS, Arm, StudyConfig, changed, near, quick_study, study_values

KEYS = [field.name for field in fields(StudyConfig)]
SHAPES = {  # key -> how it is written
    "arms": "arms: [{name: low, set: {hyper.lr: 0.001}}, {name: high, set: {hyper.lr: 0.01}}]",
    "axes": "axes: {hyper.router_lr: [0.001, 0.01]}",
    "base": "base: {data: stdlib, steps: 100}",
    "quick": "quick: {steps: 50, seeds: [0, 1]}",
    "tasks": "tasks: {one: a.txt, two: b.txt}",
    "orders": "orders: [[one, two], [two, one]]",
    "tune": "tune: [hyper.router_lr]",
    "tune_seeds": "tune_seeds: [10, 11]",
    "seeds": "seeds: [0, 1, 2]",
    "margin": "margin: 0.02",
}
KINDS = {str: "text", dict: "keys and values below it", list: "a list", int: "a whole number", float: "a number"}
WANTED: dict[str, type] = (
    dict.fromkeys(("name", "question", "falsifier", "baseline", "combine"), str)
    | dict.fromkeys(("base", "axes", "tasks", "quick"), dict)
    | dict.fromkeys(("arms", "orders", "tune", "tune_seeds", "seeds"), list)
    | {"margin": float, "record_every": int, "analysis_tokens": int}
)


def load_study(path: str | Path, *, quick: bool = False) -> StudyConfig:
    """The study that a YAML file describes; with `quick`, its short version.

    Raises:
        UserError: no YAML mapping, an unknown key, a wrong type, or what StudyConfig refuses.
    """
    values = read_yaml(str(path))
    try:
        study = parse_study(values, name=Path(path).stem)
        return quick_study(study) if quick else study
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def named_study(file: str | None, out: str | None, *, quick: bool, resume: bool) -> tuple[Path, Path]:
    """(the study's file, its folder) that a command line means; `file` may name a preset.

    Without a file, the one in the folder that is resumed; without a folder, runs/<name of the file>.
    """
    if file is None and not (resume and out):
        raise UserError("FILE.yaml: expected the file of a study, got none; or give --resume and --out DIR")
    if file is None and quick:
        raise UserError("--quick: expected a FILE.yaml with it, got none; what is resumed is as short as it was begun")
    folder = Path(out or f"runs/{Path(file or '').stem}{'-quick' if quick else ''}")
    return (folder / "study.yaml" if file is None else Path(resolve_preset(file, STUDIES))), folder


def on_device(study: StudyConfig, device: str | None) -> StudyConfig:
    """The study with another device for its runs; None leaves it."""
    return study if device is None else replace(study, base=changed(study.base, {"device": device}, "base."))


def save_study(study: StudyConfig, path: str | Path) -> None:
    """Write every key of a study as YAML; `load_study` reads the same study back."""
    write_yaml(study_values(study), path)


def parse_study(values: Mapping[Any, Any], *, name: str) -> StudyConfig:
    """The study that plain values describe, called `name` unless they say otherwise."""
    for key in values:
        if key not in KEYS:
            raise UserError(f"{key}: unknown key{near(str(key), KEYS)}")
    settings = {key: _kind(value, WANTED[key], key) for key, value in values.items() if value is not None}
    if "margin" not in settings:
        raise UserError("margin: expected nats per token, got none; set it before the runs, such as `margin: 0.02`")
    for seeds in ("seeds", "tune_seeds"):
        for seed in settings.get(seeds, ()):
            _kind(seed, int, seeds)
    for key in settings.get("tune", ()):
        _kind(key, str, "tune")
    quick = dict(settings.get("quick", {}))
    parts = {key: _kind(quick.pop(key), WANTED[key], f"quick.{key}") for key in QUICK_PARTS if key in quick}
    for seeds in ("seeds", "tune_seeds"):
        for seed in parts.get(seeds, ()):
            _kind(seed, int, f"quick.{seeds}")
    _check_names(settings.get("tasks", {}), settings.get("orders", ()), "")
    _check_names({}, parts.get("orders", ()), "quick.")
    if "axes" in parts:
        parts["axes"] = _axes(parts["axes"], "quick.axes.")
    base = _typed(settings.get("base", {}), "base.")
    parsed = {
        "name": name,
        "base": changed(RunConfig(), base, "base."),
        "arms": [_arm(entry, number) for number, entry in enumerate(settings.get("arms", ()), 1)],
        "axes": _axes(settings.get("axes", {}), "axes."),
        "quick": parts | _typed(quick, "quick."),
    }
    return StudyConfig(**parsed | {key: value for key, value in settings.items() if key == "name" or key not in parsed})


def _check_names(tasks: Mapping[Any, Any], orders: Sequence[Any], prefix: str) -> None:
    """Tasks and orders are of text."""
    for name, spec in tasks.items():
        _kind(name, str, f"{prefix}tasks")
        _kind(spec, str, f"{prefix}tasks.{name}")
    for number, order in enumerate(orders, 1):
        for name in _kind(order, list, f"{prefix}orders[{number}]"):
            _kind(name, str, f"{prefix}orders[{number}]")


def _arm(entry: Any, number: int) -> Arm:
    place = f"arms[{number}]"
    _kind(entry, dict, place)
    for key in entry:
        if key not in ("name", "set"):
            raise UserError(f"{place}.{key}: unknown key, an arm has `name` and `set`; write `{SHAPES['arms']}`")
    if not entry.get("name"):
        raise UserError(f"{place}.name: expected text, got none; name the arm")
    name = _kind(entry["name"], str, f"{place}.name")
    return Arm(name, _typed(_kind(entry.get("set") or {}, dict, f"arms.{name}.set"), f"arms.{name}.set."))


def _axes(axes: Mapping[str, Any], prefix: str) -> dict[str, list[Any]]:
    parsed = {}
    for key, values in flatten(axes).items():
        listed = _kind(values, list, f"{prefix}{key}")
        parsed[key] = [_typed({key: value}, prefix)[key] for value in listed]
    return parsed


def _typed(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted key -> value of the key's type."""
    return checked(flatten(values), lambda key: prefix + key)


def _kind(value: Any, kind: type, key: str) -> Any:
    fine = isinstance(value, kind) and not isinstance(value, bool)
    if kind is float:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if not fine:
        shape = SHAPES.get(key.partition("[")[0])
        mend = f"; write `{shape}`" if shape else "; write it as [a, b]" if kind is list else ""
        raise UserError(f"{key}: expected {KINDS[kind]}, got {'none' if value is None else shown(value)}{mend}")
    return value
