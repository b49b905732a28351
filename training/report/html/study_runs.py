"""The part of a study's page with a point for every run: held-out loss, regret and drift against each other."""

import math
from collections.abc import Mapping, Sequence

from training.report.html.arms import Arm
from training.report.html.charts import Chart
from training.report.html.point_charts import Points, point_chart
from training.report.html.wording import number
from training.storage.results import FINISHED, Row

MEASURES = {"nats_per_token": "held-out loss", "regret": "regret", "routing_drift": "drift"}
UNITS = {"nats_per_token": "nats per token", "regret": "nats", "routing_drift": "share"}
PAIRS = (("regret", "nats_per_token"), ("routing_drift", "nats_per_token"), ("routing_drift", "regret"))


def run_charts(arms: Sequence[Arm], rows: Sequence[Row]) -> list[Chart]:
    """Three charts, a point for each compared run that is finished; [] where neither regret nor drift is known."""
    by_run = {row["run"]: row for row in rows if row["status"] == FINISHED}
    runs = [(arm, by_run[run]) for arm in arms for run in arm.result["runs"] if run in by_run]
    charts = [_chart(x, y, arms, runs) for x, y in PAIRS]
    return [chart for chart in charts if chart.spec]


def _chart(x: str, y: str, arms: Sequence[Arm], runs: Sequence[tuple[Arm, Row]]) -> Chart:
    drawn, table = [], []
    for arm in arms:
        known = [row for of, row in runs if of is arm and None not in (_value(row, x), _value(row, y))]
        said = [f"{row['run']}: {', '.join(_named(row, key) for key in MEASURES)}" for row in known]
        xs, ys = [_value(row, x) or 0.0 for row in known], [_value(row, y) for row in known]
        drawn += [Points(arm.label, arm.short, arm.slot, xs, ys, said)]
        table += [[row["run"], *(number(_value(row, key)) for key in (x, y))] for row in known]
    axes = tuple(f"{MEASURES[key]}, {UNITS[key]}" for key in (x, y))
    title = f"{MEASURES[y]} against {MEASURES[x]}"
    return point_chart(title, "", drawn, (axes[0], axes[1]), ("run", MEASURES[x], MEASURES[y]), table)


def _value(row: Mapping[str, object], key: str) -> float | None:
    """The number of a row, which may be text; None where it is none."""
    try:
        value = float(str(row.get(key)))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _named(row: Row, key: str) -> str:
    return f"{MEASURES[key]} {number(_value(row, key))}"
