"""The part of a study's page about a stream of tasks: forgetting, plasticity, and every arm's matrix of scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from training.report.html import elements as h
from training.report.html.elements import Html, bounds, element, number, with_small
from training.report.html.heat_maps import SHADES, level_class
from training.report.html.study_arms import Group, ShownArm, Study

SummaryOf = Callable[[str], Mapping[str, Any]]  # run -> its summary.json
HEAD = {
    "bwt": "backward transfer (less than 0: forgotten)",
    "forgetting": "forgetting (0: none)",
    "plasticity": "plasticity: loss of a task just learned",
}
CELL = 26  # pixels, the height of a cell of a matrix
DARK = 4  # levels below it want bright text


def tasks_part(study: Study, groups: Sequence[Group], summary_of: SummaryOf) -> Html:
    """The sections; nothing where the study has no tasks."""
    measures = study.analysis.get("continual")
    if not measures:
        return Html("")
    arms = [arm for group in groups for arm in group.best_first()]
    return h.section(
        "Stream of tasks",
        h.facts(_facts(study.values)),
        _measures(arms, measures),
        _matrices(study, arms, summary_of),
    )


def _facts(values: Mapping[str, Any]) -> list[tuple[str, object]]:
    tasks = values.get("tasks") or {}
    orders = values.get("orders") or [list(tasks)]
    texts = ", ".join(f"{name} ({data})" for name, data in tasks.items())
    sequences = "; ".join(f"{number}: {' > '.join(map(str, order))}" for number, order in enumerate(orders, 1))
    steps = (values.get("base") or {}).get("steps")
    each = steps // len(tasks) if isinstance(steps, int) and tasks else h.NOTHING
    return [("tasks", texts), ("orders", sequences), ("steps of a task", each)]


def _measures(arms: Sequence[ShownArm], measures: Mapping[str, Any]) -> Html:
    """One line an arm: each measure, below it its interval; the difference to the baseline, below it its interval."""
    rows: list[list[object]] = []
    for arm in arms:
        cells: list[object] = [arm.label]
        for key in HEAD:
            result = measures.get(arm.label, {}).get(key, {})
            cells.append(with_small(number(result.get("mean")), bounds(result.get("low"), result.get("high"))))
            low, high = result.get("difference_low"), result.get("difference_high")
            cells.append(with_small(number(result.get("difference"), "+.4f"), bounds(low, high, "+.4f")))
        rows.append(cells)
    head = ["arm", *(name for key in HEAD.values() for name in (key, "difference to baseline"))]
    notes = [
        "Nats per token, means over seeds and orders with 95 % t-intervals. Differences are arm − baseline at the same "  # noqa: RUF001
        "seed and the same order of the tasks, and are not corrected for the number of arms. Runs of one seed have "
        "luck in common, and so have those of one order: intervals are for other seeds, and of several orders for "
        "other ones as well; of one order they are for that one alone.",
        "Backward transfer: by how much the loss of a task has fallen since the task was learned, mean over all tasks "
        "but the last; less than 0 is forgetting. Forgetting: by how much it has risen above its lowest value at the "
        "end of any earlier task. Plasticity: the loss of a task when it has just been learned; less is better.",
        "An arm that learns little has little to forget: read the three together. The verdicts above are on the mean "
        "loss of all tasks at the end.",
    ]
    table = h.table("Forgetting and plasticity", head, rows)
    return h.join((table, element("div", h.bullets(notes), class_="note")))


# Matrices -------------------------------------------------------------------------------------------------------------


def _matrices(study: Study, arms: Sequence[ShownArm], summary_of: SummaryOf) -> Html:
    """A map for each arm, all on one scale."""
    means = {arm.label: _mean_matrix(arm, summary_of) for arm in arms}
    known = [mean for mean in means.values() if mean is not None]
    if not known:
        return h.paragraph("No run is finished, so there is no matrix of scores yet.", class_="note")
    low, high = min(float(mean.min()) for mean in known), max(float(mean.max()) for mean in known)
    note = (
        "Rows: after the first task, the second one, and so on, from above. Columns: the score of the first task of "
        "the order, the second one, and so on; held-out nats per token, means over seeds and orders. On the diagonal "
        "stands the loss of a task just learned, below it what became of that later. All maps have one scale, dark "
        f"{low:.2f} to bright {high:.2f}."
    )
    maps = [_matrix(label, mean, low, high) for label, mean in means.items() if mean is not None]
    return h.join((
        element("h3", "Scores of every task after every task"), h.paragraph(note, class_="note"),
        element("div", *maps, class_="maps"),
    ))  # fmt: skip


def _mean_matrix(arm: ShownArm, summary_of: SummaryOf) -> Float[np.ndarray, "after task"] | None:
    """Mean over the arm's runs that are finished."""
    matrices = [matrix for run in arm.result["runs"] if (matrix := summary_of(run).get("score_matrix"))]
    return np.mean(np.asarray(matrices, dtype=float), axis=0) if matrices else None


def _matrix(label: str, mean: Float[np.ndarray, "after task"], low: float, high: float) -> Html:
    """Cells with their numbers."""
    levels = np.rint((mean - low) / max(high - low, 1e-12) * (SHADES - 1)).astype(int)
    size, parts = len(mean), []
    for row, column in np.ndindex(*mean.shape):
        level = int(levels[row, column])
        place = {"x": f"{100 * column / size:.4g}%", "y": row * CELL}
        parts.append(element("rect", **place, width=f"{100 / size:.4g}%", height=CELL, class_=level_class(level, "s")))
        ink = "fill:#fff" if level < DARK else "fill:#111"
        middle = {"x": f"{100 * (column + 0.5) / size:.4g}%", "y": row * CELL + CELL * 0.68, "text_anchor": "middle"}
        parts.append(element("text", f"{mean[row, column]:.2f}", **middle, style=ink))
    said = f"{label}: losses of {size} tasks after each of them, {mean.min():.2f} to {mean.max():.2f} nats per token"
    picture = element("svg", *parts, width="100%", height=size * CELL, role="img", aria_label=said)
    return element("figure", element("figcaption", label), picture)
