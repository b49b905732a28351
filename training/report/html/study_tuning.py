"""The part of a study's page about tuning: every arm's held-out loss over each tuned axis."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.report.html.arms import Arm
from training.report.html.charts import Chart
from training.report.html.point_charts import Points, point_chart
from training.report.html.wording import NOTHING, number


def tuning_charts(tuned: Sequence[str], arms: Sequence[Arm]) -> list[Chart]:
    """A chart for each tuned axis: its values across, a line an arm, the others of its axes at their best.

    A star is the value at which the arm is compared.
    """
    return [chart for key in tuned if (chart := _chart(key, arms)) is not None]


def _chart(key: str, arms: Sequence[Arm]) -> Chart | None:
    curves = [(arm, arm.result["tuning"][key]) for arm in arms if key in (arm.result.get("tuning") or {})]
    if not curves:
        return None
    values = [*dict.fromkeys(value for _, curve in curves for value in curve["values"])]
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    categories, short = [_text(value) for value in values], key.rpartition(".")[2]
    drawn = [_points(arm, curve, short) for arm, curve in curves]
    rows = [[arm.label, *(_cell(curve, value) for value in values), _text(curve["best"])] for arm, curve in curves]
    head = ("held-out nats per token", *categories, "best")
    axes = (key, "nats per token")
    return point_chart(short, "held-out, of the tuning", drawn, axes, head, rows, categories=categories)


def _points(arm: Arm, curve: Mapping[str, Any], short: str) -> Points:
    said = [
        f"{arm.label}, {short} {_text(value)}: {_mean(mean, diverged)}, of {len(scores)} runs"
        + (f" {number(min(scores))} to {number(max(scores))}" if len(scores) > 1 else "")
        for value, mean, scores, diverged in zip(
            curve["values"], curve["mean"], curve["scores"], curve["diverged"], strict=True
        )
    ]
    best = curve["values"].index(curve["best"])
    x = [_text(value) for value in curve["values"]]
    return Points(arm.label, arm.short, arm.slot, x, curve["mean"], said, lines=True, best=best)


def _cell(curve: Mapping[str, Any], value: Any) -> str:
    if value not in curve["values"]:
        return NOTHING
    at = curve["values"].index(value)
    return _mean(curve["mean"][at], curve["diverged"][at])


def _mean(mean: float | None, diverged: int) -> str:
    return number(mean) + (f", {diverged} diverged" if diverged else "")


def _text(value: Any) -> str:
    return format(value, "g") if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
