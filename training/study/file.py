"""Text -> StudyConfig: the YAML file of a study, every error one line that names the file and the key."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tiny_onn_func.tree import flatten
from training.errors import UserError
from training.presets.find import STUDIES, resolve_preset
from training.run.config import PLAIN_MODEL, RunConfig
from training.run.settings import checked
from training.storage.plain_yaml import read_yaml, write_yaml
from training.storage.typed import typed
from training.study.config import KEYS, QUICK_PARTS, Arm, StudyConfig, changed, near, quick_study, study_values

NAMES = [field.name for field in fields(StudyConfig)]
MAPPING = Mapping[Any, Any]
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
        if key not in NAMES:
            raise UserError(f"{key}: unknown key{near(str(key), NAMES)}")
    given = {key: value for key, value in values.items() if value is not None}
    if "margin" not in given:
        raise UserError("margin: expected nats per token, got none; set it before the runs, such as `margin: 0.02`")
    base, axes, quick = ({**_shaped(MAPPING, given.pop(key, {}), key)} for key in ("base", "axes", "quick"))
    arms = _shaped(Sequence[Any], given.pop("arms", ()), "arms")
    parts = {key: _shaped(hint, quick.pop(key), f"quick.{key}") for key, hint in QUICK_PARTS.items() if key in quick}
    if "axes" in parts:
        parts["axes"] = _axes(parts["axes"], "quick.axes.")
    return StudyConfig(
        **{"name": name} | {key: _shaped(KEYS[key], value, key) for key, value in given.items()},
        base=changed(RunConfig(model=PLAIN_MODEL), _typed(base, "base."), "base."),
        arms=[_arm(entry, number) for number, entry in enumerate(arms, 1)],
        axes=_axes(axes, "axes."),
        quick=parts | _typed(quick, "quick."),
    )


def _arm(entry: Any, number: int) -> Arm:
    place = f"arms[{number}]"
    for key in _shaped(MAPPING, entry, place):
        if key not in ("name", "set"):
            raise UserError(f"{place}.{key}: unknown key, an arm has `name` and `set`; write `{SHAPES['arms']}`")
    if not entry.get("name"):
        raise UserError(f"{place}.name: expected text, got none; name the arm")
    name = _shaped(str, entry["name"], f"{place}.name")
    changes = _shaped(MAPPING, entry.get("set") or {}, f"arms.{name}.set")
    return Arm(name, _typed(changes, f"arms.{name}.set."))


def _axes(axes: Mapping[str, Any], prefix: str) -> dict[str, list[Any]]:
    parsed = {}
    for key, values in flatten(axes).items():
        listed = _shaped(Sequence[Any], values, f"{prefix}{key}")
        parsed[key] = [_typed({key: value}, prefix)[key] for value in listed]
    return parsed


def _typed(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted key -> value of the key's type."""
    return checked(flatten(values), lambda key: prefix + key)


def _shaped(hint: Any, value: Any, key: str) -> Any:
    return typed(hint, value, key, SHAPES.get(key.partition("[")[0], ""))
