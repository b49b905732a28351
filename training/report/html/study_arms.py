"""Data of a study's page: contents of the folder, and every arm with its curves, loads and alarms."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from numpy import array, ndarray

from training.report.html.charts import Curve
from training.report.html.elements import Html, with_small
from training.report.html.heat_maps import last_tables
from training.report.html.study_layers import LAYERED, by_layer, layer_key, shown_layers
from training.report.series import Records, columns, gather, numbers
from training.storage.results import DIVERGED, FINISHED, Row, pair_key

POINTS = 250  # most points of a curve
CURVES = ("main_loss", "held_out_nats", "max_vio", "avg_k", "routing_drift")


class Study(NamedTuple):
    """Contents of a study's folder that its page shows."""

    folder: str  # as the reader names it
    values: Mapping[str, Any]  # of study.yaml
    text: str  # of study.yaml
    analysis: Mapping[str, Any]
    rows: Sequence[Row]  # of results.csv


class ShownArm(NamedTuple):
    """One arm of the page."""

    label: str
    short: str  # the label without the point of the axes that its whole group has
    result: Mapping[str, Any]  # of analysis["arms"]
    pair: Mapping[str, Any] | None  # of analysis["against_baseline"]; None is a baseline
    slot: int  # of colour and dashes: 0 for the baseline, then in the study's order
    curves: dict[str, Curve]  # means over its runs, by key of a record, and by `layer_key`
    load: Float[ndarray, "layers experts"] | None  # at the end of the run below
    layers: int  # of its runs; 0 where no load is known
    load_run: str  # the first of its runs that did not diverge
    together: Float[ndarray, "layers experts experts"] | None  # cosines of co-activation of the same run
    alarms: list[Sequence[str]]  # of each run
    ends: dict[str, int]  # diverged run -> its last step


class Group(NamedTuple):
    """A baseline and the arms that are compared with it, in the study's order."""

    baseline: str
    arms: list[ShownArm]

    def best_first(self) -> list[ShownArm]:
        """The arms by their mean score."""
        return sorted(self.arms, key=lambda arm: float("inf") if arm.result["mean"] is None else arm.result["mean"])


def read_groups(
    study: Study, history_of: Callable[[str], Records], summary_of: Callable[[str], Mapping[str, Any]]
) -> list[Group]:
    """All arms. `history_of` and `summary_of` give a run's records and summary; each is asked once for each run."""
    labels: dict[str, list[str]] = {}
    for label in study.analysis["arms"]:
        pair = study.analysis["against_baseline"].get(label, {})
        labels.setdefault(pair.get("baseline", label), []).append(label)
    groups = []
    for baseline, members in labels.items():
        others = [label for label in members if label != baseline]
        slots = {baseline: 0} | {label: slot for slot, label in enumerate(others, 1)}
        shown = [_shown(study, label, slots[label], history_of, summary_of) for label in members]
        end = shared_end(members) if len(labels) > 1 else ""
        shown = [arm._replace(short=arm.label.removesuffix(end)) for arm in shown]
        groups.append(Group(baseline, [_named_shortly(arm) for arm in shown]))
    return groups


def shared_end(labels: Sequence[str]) -> str:
    """The words key=value with which all of several labels end, each label being longer; "" if there are none.

    ["frozen data=a", "hash data=a"] -> " data=a"
    """
    words = [label.split(" ") for label in labels]
    count = 0
    while all(len(parts) > count + 1 and "=" in parts[-1 - count] for parts in words) and len(labels) > 1:
        if len({parts[-1 - count] for parts in words}) > 1:
            break
        count += 1
    return "".join(f" {word}" for word in words[0][len(words[0]) - count :])


def _named_shortly(arm: ShownArm) -> ShownArm:
    """Rename an arm's curves to its short name within the group."""
    return arm._replace(curves={key: curve._replace(name=arm.short) for key, curve in arm.curves.items()})


def arm_name(arm: ShownArm) -> Html:
    """The arm's label, and the values that were chosen for it."""
    tuned = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in arm.result.get("tuned", {}).items())
    return with_small(arm.short, f"chosen: {tuned}" if tuned else "")


def scores_by_seed(study: Study, arm: ShownArm) -> dict[str, float]:
    """Seed (and order of tasks) -> held-out nats per token of the arm's finished runs, those that are finite."""
    runs = [row for row in study.rows if row["run"] in arm.result["runs"] and row["status"] == FINISHED]
    scores = {pair_key(row): float(row["nats_per_token"]) for row in runs}
    return {key: score for key, score in scores.items() if math.isfinite(score)}


def _shown(
    study: Study, label: str, slot: int, history_of: Callable[[str], Records],
    summary_of: Callable[[str], Mapping[str, Any]],
) -> ShownArm:  # fmt: skip
    result = study.analysis["arms"][label]
    records = {run: history_of(run) for run in result["runs"]}
    lost = {row["run"] for row in study.rows if row["status"] == DIVERGED}
    ends = {run: int(history[-1]["step"]) for run, history in records.items() if run in lost and history}
    loads = ((run, last_tables(history, "expert_load")) for run, history in records.items() if run not in lost)
    run, load = next(((run, load) for run, load in loads if load is not None), ("", None))
    curves = {key: _mean_curve(label, slot, [*records.values()], key) for key in CURVES}
    layered, layers = [by_layer(history) for history in records.values()], 0 if load is None else load.shape[0]
    for key in (layer_key(name, layer) for name, _ in LAYERED for layer in shown_layers(layers)):
        curves[key] = _mean_curve(label, slot, layered, key)
    summaries = {name: summary_of(name) for name in records}
    alarms = [summary.get("alarms") or [] for summary in summaries.values()]
    together = _cube((summaries.get(run, {}).get("routing") or {}).get("co_activation_cosine"))
    pair = study.analysis["against_baseline"].get(label)
    return ShownArm(label, label, result, pair, slot, curves, load, layers, run, together, alarms, ends)


def _cube(value: Any) -> Float[ndarray, "layers experts experts"] | None:
    """A table for each layer, None for anything else."""
    try:
        cube = array(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return cube if cube.ndim == 3 and cube.size else None


def _mean_curve(label: str, slot: int, runs: Sequence[Records], key: str) -> Curve:
    """Mean over the runs that have a record of the step."""
    by_step: dict[float, list[float]] = {}
    for history in runs:
        for step, value in zip(numbers(history, "step").tolist(), numbers(history, key).tolist(), strict=True):
            if value == value and step == step:  # both are known
                by_step.setdefault(step, []).append(value)
    merged = [{"step": step, "value": sum(values) / len(values)} for step, values in sorted(by_step.items())]
    at = columns(merged, POINTS)
    return Curve(label, at.x, gather(numbers(merged, "value"), at.starts), slot)
