"""Charts of points, with or without lines between them: one trace an arm, over numbers or over named values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from training.report.html.charts import DASHES, Chart, Rows, look, text_of
from training.report.html.wording import number


class Points(NamedTuple):
    """Points of one arm."""

    arm: str
    name: str
    slot: int
    x: Sequence[float | str]
    y: Sequence[float | None]
    said: Sequence[str]  # of each point, where the pointer is
    lines: bool = False  # between neighbours
    best: int | None = None  # the point that is marked


def point_chart(
    title: str, unit: str, drawn: Sequence[Points], axes: tuple[str, str], head: Sequence[str], rows: Rows, *,
    categories: Sequence[str] = (), empty: str = "no data",
) -> Chart:  # fmt: skip
    """Points of several arms.

    Args:
        axes: what goes across and up.
        head, rows: of the table that stands in for the figure.
        categories: names of places on the horizontal axis, evenly spaced in this order; x are some of them.
    """
    drawn = [points for points in drawn if any(y is not None for y in points.y)]
    if not drawn:
        return Chart(title, unit, empty, {}, (), ())
    across: dict[str, Any] = {"title": {"text": text_of(axes[0])}}
    if categories:
        names = [text_of(name, 12) for name in categories]
        across |= {
            "tickvals": [*range(len(names))],
            "ticktext": names,
            "range": [-0.4, len(names) - 0.6],
        }
    layout = {"height": 280, "hovermode": "closest", "xaxis": across, "yaxis": {"title": {"text": text_of(axes[1])}}}
    said = f"{title}, {axes[1]} over {axes[0]}: " + "; ".join(_in_words(points) for points in drawn)
    data = [_trace(points, categories) for points in drawn]
    return Chart(title, unit, said, {"data": data, "layout": layout}, head, rows)


def _trace(points: Points, categories: Sequence[str]) -> dict[str, Any]:
    colour, dash = look(points.slot)
    places = [categories.index(str(x)) for x in points.x] if categories else [*points.x]
    sizes = [12 if points.best == i else 7 for i in range(len(places))]
    symbols = ["star" if points.best == i else "circle" for i in range(len(places))]
    return {
        "type": "scatter", "mode": "lines+markers" if points.lines else "markers", "name": text_of(points.name),
        "x": places, "y": [*points.y], "text": [text_of(said, 200) for said in points.said], "hoverinfo": "text",
        "line": {"color": f"var(--c{colour})", "dash": DASHES[dash]},
        "marker": {"color": f"var(--c{colour})", "size": sizes, "symbol": symbols}, "meta": {"arm": points.arm},
    }  # fmt: skip


def _in_words(points: Points) -> str:
    known = [y for y in points.y if y is not None]
    return f"{points.name} {number(min(known), '.4g')} to {number(max(known), '.4g')}"
