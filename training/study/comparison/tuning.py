"""Tuning of a study: the point of its tuned axes at which each arm is compared, and each arm's curve over every axis.

An arm takes the point with the best mean held-out score of the runs that choose: those of `tune_seeds`, or without them
those that are compared. Points where a run diverged come last, before them those with fewer runs. All arms have the
same axes, values and seeds, but for the axes that an arm sets itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from training.ranges import ranges_of
from training.step.hyper_params import HyperParams
from training.storage.results import DIVERGED, FINISHED, Row, pair_key
from training.study.config import StudyConfig, expand

SCORE = "nats_per_token"
RANGES = {f"hyper.{name}": range_.rules for name, range_ in ranges_of(HyperParams).items()}


class Point(NamedTuple):
    """Values of an arm's tuned axes, and the rows of the runs there that choose."""

    values: dict[str, Any]
    rows: list[Row]

    def scores(self) -> dict[str, float]:
        """Seed (and order of tasks) -> score of the runs that are finished."""
        return {pair_key(row): float(row[SCORE]) for row in self.rows if row["status"] == FINISHED}

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(row["status"] == DIVERGED for row in self.rows)

    def rank(self) -> tuple[int, int, float]:
        """The lowest is the best point."""
        scores = self.scores()
        return self.diverged, -len(scores), fmean(scores.values()) if scores else math.inf


def as_judged(row: Row) -> Row:
    """The row with the status that counts: a run whose score is not finite diverged."""
    broken = row["status"] == FINISHED and not math.isfinite(float(row[SCORE]))
    return row | {"status": DIVERGED} if broken else row


def points_of(study: StudyConfig, rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Label -> its points; one without values where nothing of it is tuned."""
    by_run = {row["run"]: as_judged(row) for row in rows}
    points: dict[str, dict[str, Point]] = {}
    for run in expand(study):
        point = points.setdefault(run.arm, {}).setdefault(str(run.tuned), Point(run.tuned, []))
        point.rows.extend([by_run[run.id]] if run.id in by_run else [])
    return {label: [*of_label.values()] for label, of_label in points.items()}


def choose(points: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, Any]]:
    """Label -> tuned axis -> the value at which it is compared; the first of equal ones."""
    return {label: min(of_label, key=Point.rank).values for label, of_label in points.items()}


def tuning_curves(points: Sequence[Point], *, zipped: bool = False) -> dict[str, dict[str, Any]]:
    """Curve of an arm's scores along each of its tuned axes, with all other axes at their best.

    A curve has `values`, at each the `mean` score, the `scores` and the number `diverged`; then the `best` value, and
    the `edge` of the axis at which it lies.

    Args:
        zipped: all axes go together, so that no other one stays at its best.
    """
    best = min(points, key=Point.rank)
    curves = {}
    for key, value in best.values.items():
        others = {other: value for other, value in best.values.items() if other != key}
        on = [point for point in points if zipped or others.items() <= point.values.items()]
        on.sort(key=lambda point: point.values[key] if _is_number(point.values[key]) else 0)
        scores = [point.scores() for point in on]
        curves[key] = {
            "values": [point.values[key] for point in on],
            "mean": [fmean(of.values()) if of else None for of in scores],
            "scores": [[*of.values()] for of in scores],
            "diverged": [point.diverged for point in on],
            "best": value,
            "edge": _edge(key, value, [point.values[key] for point in on]) if any(scores) else "",
        }
    return curves


def tuning_warnings(label: str, points: Sequence[Point], curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines on axes whose best value is their last one, and on those that change nothing in the arm."""
    lines = []
    for key, curve in curves.items():
        if _changes_nothing(key, points):
            lines.append(f"{label}: {key} changes no score of it; set it in the arm, which saves {len(points)} points")
        elif curve["edge"]:
            mend = f"a {'smaller' if curve['edge'] == 'smallest' else 'larger'} one may be better, add it to axes.{key}"
            lines.append(f"{label}: its best {key}, {curve['best']:g}, is the {curve['edge']} that was tried; {mend}")
    return lines


def _changes_nothing(key: str, points: Sequence[Point]) -> bool:
    """True if the scores at points that differ in this axis alone are the same to the last digit."""
    alike: dict[str, list[dict[str, float]]] = {}
    for point in points:
        rest = {k: v for k, v in point.values.items() if k != key}
        alike.setdefault(str(rest), []).append(point.scores())
    return any(len(scores) > 1 for scores in alike.values()) and all(
        scores[0] and scores == scores[:1] * len(scores) for scores in alike.values()
    )


def _edge(key: str, value: Any, values: Sequence[Any]) -> str:
    """ "smallest" or "largest" where the best value is the last one of a numeric axis; "" where the key itself ends."""
    if not all(map(_is_number, values)) or len(values) < 2:
        return ""
    rules = RANGES.get(key, {})
    if value == max(values):
        return "" if value == rules.get("maximum") else "largest"
    return "smallest" if value == min(values) and value != rules.get("minimum") else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
