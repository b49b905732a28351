"""The part of a study's page about a stream of tasks: forgetting, plasticity, and every arm's matrix of scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from training.report.html.arms import Arm
from training.report.html.charts import Chart
from training.report.html.heat_maps import TOP, level_map
from training.report.html.page import Cell
from training.report.html.study_arms import Study, SummaryOf
from training.report.html.wording import NOTHING, bounds, number

HEAD = {
    "bwt": "backward transfer (less than 0: forgotten)",
    "forgetting": "forgetting (0: none)",
    "plasticity": "plasticity: loss of a task just learned",
}


def tasks_values(study: Study, arms: Sequence[Arm], summary_of: SummaryOf) -> dict[str, Any] | None:
    """Values of the template's part; None where the study has no tasks."""
    measures = study.analysis.get("continual")
    if not measures:
        return None
    known = [(arm, mean) for arm in arms if (mean := _mean_matrix(arm, summary_of)) is not None]
    low = min((float(mean.min()) for _, mean in known), default=0.0)
    high = max((float(mean.max()) for _, mean in known), default=0.0)
    return {
        "facts": _facts(study.values),
        "head": ["arm", *(name for key in HEAD.values() for name in (key, "difference to baseline"))],
        "rows": [_measures(arm, measures.get(arm.label, {})) for arm in arms],
        "matrices": [_matrix(arm, mean, low, high) for arm, mean in known],
        "low": f"{low:.2f}", "high": f"{high:.2f}",
    }  # fmt: skip


def _facts(values: Mapping[str, Any]) -> list[tuple[str, object]]:
    tasks = values.get("tasks") or {}
    orders = values.get("orders") or [list(tasks)]
    texts = ", ".join(f"{name} ({data})" for name, data in tasks.items())
    sequences = "; ".join(f"{number}: {' > '.join(map(str, order))}" for number, order in enumerate(orders, 1))
    steps = (values.get("base") or {}).get("steps")
    each = steps // len(tasks) if isinstance(steps, int) and tasks else NOTHING
    return [("tasks", texts), ("orders", sequences), ("steps of a task", each)]


def _measures(arm: Arm, measures: Mapping[str, Any]) -> list[Cell]:
    """Each measure, below it its interval; the difference to the baseline, below it its interval."""
    cells = [Cell(arm.label, slot=arm.slot)]
    for key in HEAD:
        result = measures.get(key, {})
        cells.append(Cell(number(result.get("mean")), (bounds(result.get("low"), result.get("high")),)))
        low, high = result.get("difference_low"), result.get("difference_high")
        cells.append(Cell(number(result.get("difference"), "+.4f"), (bounds(low, high, "+.4f"),)))
    return cells


def _mean_matrix(arm: Arm, summary_of: SummaryOf) -> Float[np.ndarray, "after task"] | None:
    """Mean over the arm's runs that are finished."""
    matrices = [matrix for run in arm.result["runs"] if (matrix := summary_of(run).get("score_matrix"))]
    return np.mean(np.asarray(matrices, dtype=float), axis=0) if matrices else None


def _matrix(arm: Arm, mean: Float[np.ndarray, "after task"], low: float, high: float) -> Chart:
    """Cells with their numbers, all arms on one scale."""
    levels = TOP * (mean - low) / max(high - low, 1e-12)
    names = [*map(str, range(1, len(mean) + 1))]
    spec = level_map(
        [("", levels, mean)], "s", "nats per token", ("after task", "score of task"), names=names, digits=2
    )
    rows = [[f"after task {i}", *(f"{value:.2f}" for value in row)] for i, row in enumerate(mean.tolist(), 1)]
    said = f"{arm.label}: losses of {len(mean)} tasks after each of them, {mean.min():.2f} to {mean.max():.2f}"
    head = ("", *(f"task {name}" for name in names))
    return Chart(arm.label, "nats per token", said, spec, head, rows, arm=arm.label, slot=arm.slot)
