"""Charts as inline SVG: curves, and differences with intervals. As wide as the page, text never scaled.

Horizontal places are percentages and curves lie in a nested drawing that stretches, so that a chart fits a phone and
its text keeps its size. Colours are classes of the style sheet: slot 0 is grey, slots 1 to 7 are colours, later ones
are the same colours dashed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from training.report.html.elements import Html, element, join, number

HEIGHT = 190  # pixels of a chart's field
SCALE = 52  # pixels of the numbers on its left
INNER = 1000  # both sides of the nested drawing
COLOURS, DASHES = 7, 4
FEW = 25  # points of a curve that are marked one by one
OUTLIER = 10.0  # values this many times the range of 95 % of the others are cut off


Place = Callable[[float], float]  # a value's place in the frame


class Curve(NamedTuple):
    """One line of a chart."""

    name: str
    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]  # NaN where nothing is known
    slot: int  # of colour and dashes


class Difference(NamedTuple):
    """One row of a forest plot; bounds may be unknown."""

    name: Html
    mean: float | None
    low: float | None
    high: float | None
    each: Sequence[float]  # of every pair
    verdict: str
    value: Html  # the numbers in words


def slot_class(slot: int) -> str:
    """Classes of a slot's colour and dashes."""
    colour, dash = (0, 0) if slot == 0 else ((slot - 1) % COLOURS + 1, (slot - 1) // COLOURS % DASHES)
    return f"c{colour} d{dash}" if dash else f"c{colour}"


def legend(names: Sequence[tuple[object, int]]) -> Html:
    """Legend of a chart: line style and name of each slot."""

    def sample(slot: int) -> Html:
        line = element("line", x1=0, x2=26, y1=6, y2=6, class_=f"line {slot_class(slot)}")
        return element("svg", line, width=26, height=12, aria_hidden="true")

    return element("ul", *(element("li", sample(slot), element("span", name)) for name, slot in names), class_="legend")


# Curves ---------------------------------------------------------------------------------------------------------------


def line_chart(
    title: str, unit: str, curves: Sequence[Curve], *, empty: str = "no data", levels: Mapping[str, float] | None = None
) -> Html:
    """Curves over steps in one frame; `levels` are named horizontal lines."""
    known = [curve for curve in curves if np.isfinite(curve.y).any()]
    caption = element("figcaption", title, element("small", unit))
    if not known:
        return element("figure", caption, element("div", element("div", empty, class_="empty"), class_="plot"))
    left, right = min(float(c.x.min()) for c in known), max(float(c.x.max()) for c in known)
    left, right = (left, right) if right > left else (left - 1, right + 1)
    low, high, cut = _range(np.concatenate([curve.y for curve in known]), list((levels or {}).values()))
    places = ticks(low, high, 5)

    def down(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    scale = [element("text", _tick(v, places), x=SCALE - 8, y=f"{down(v) + 4:.1f}", text_anchor="end") for v in places]
    lines = [element("line", x1=0, x2="100%", y1=f"{down(v):.1f}", y2=f"{down(v):.1f}", class_="grid") for v in places]
    steps = [_under(value, (value - left) / (right - left)) for value in ticks(left, right, 4) if value == int(value)]
    field = join((
        *lines, *(_level(name, down(value)) for name, value in (levels or {}).items()),
        _stretched(known, (left, right), (low, high)), *_dots(known, (left, right), down), *steps,
    ))  # fmt: skip
    said = f"{title}, {unit}: " + "; ".join(f"{c.name} {_course(c.y)}" for c in known)
    drawn = join((
        element("svg", *scale, class_="scale", width=SCALE, height=HEIGHT + 20, aria_hidden="true"),
        element("svg", field, class_="field", height=HEIGHT + 20, role="img", aria_label=said),
    ))  # fmt: skip
    note = element("p", "Values beyond the frame are cut off.", class_="note") if cut else ""
    return element("figure", caption, element("div", drawn, class_="plot"), note)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most about `most`."""
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(i * size, 12) for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _range(values: np.ndarray, levels: Sequence[float]) -> tuple[float, float, bool]:
    """(low, high, True if values lie beyond); a few outliers do not flatten all other values."""
    values = values[np.isfinite(values)]
    low, usual, high = (float(v) for v in (values.min(), np.percentile(values, 95), values.max()))
    cut = high - low > OUTLIER * (usual - low) > 0
    if cut:
        high = low + 1.2 * (usual - low)
    low, high = min([low, *levels]), max([high, *levels])
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (0.0 if 0 <= low < room else low - room), high + room, cut


def _tick(value: float, places: Sequence[float]) -> str:
    """All ticks of a scale with as many decimals as their distance needs."""
    gap = abs(places[1] - places[0]) if len(places) > 1 else 1.0
    if max(abs(v) for v in places) >= 1e5:
        return number(value, ".3g")
    return number(value, f".{max(0, min(6, -math.floor(math.log10(gap) + 1e-9)))}f")


def _under(value: float, share: float) -> Html:
    """A number below the field, kept within it."""
    anchor = "start" if share < 0.05 else "end" if share > 0.95 else "middle"
    return element("text", f"{value:,.0f}", x=f"{100 * share:.2f}%", y=HEIGHT + 16, text_anchor=anchor)


def _level(name: str, y: float) -> Html:
    line = element("line", x1=0, x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level")
    return join((line, element("text", name, x="100%", y=f"{y - 4:.1f}", text_anchor="end")))


def _stretched(curves: Sequence[Curve], across: tuple[float, float], up: tuple[float, float]) -> Html:
    """The lines, in a drawing whose sides are stretched to the field's."""
    paths = []
    for curve in curves:
        x = INNER * (curve.x - across[0]) / (across[1] - across[0])
        y = np.clip(INNER * (up[1] - curve.y) / (up[1] - up[0]), -10 * INNER, 10 * INNER)
        path, pen = [], "M"
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            if math.isnan(b):
                pen = "M"
                continue
            path.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        paths.append(
            element("path", element("title", curve.name), d="".join(path), class_=f"line {slot_class(curve.slot)}")
        )
    return element(
        "svg", *paths, x=0, y=0, width="100%", height=HEIGHT, viewBox=f"0 0 {INNER} {INNER}", preserveAspectRatio="none"
    )  # fmt: skip


def _dots(curves: Sequence[Curve], across: tuple[float, float], down: Place) -> list[Html]:
    """Marks on curves of few points: a curve of one point would not be seen."""
    dots = []
    for curve in curves:
        finite = np.isfinite(curve.y)
        if finite.sum() > FEW:
            continue
        for x, y in zip(curve.x[finite].tolist(), curve.y[finite].tolist(), strict=True):
            share, place = (x - across[0]) / (across[1] - across[0]), down(y)
            if 0 <= place <= HEIGHT:
                dots.append(
                    element(
                        "circle",
                        cx=f"{100 * share:.2f}%",
                        cy=f"{place:.1f}",
                        r=2.6,
                        class_=f"dot {slot_class(curve.slot)}",
                    )
                )
    return dots


def _course(y: np.ndarray) -> str:
    known = y[np.isfinite(y)]
    return f"from {known[0]:.4g} to {known[-1]:.4g}"


# Differences ----------------------------------------------------------------------------------------------------------


def forest(rows: Sequence[Difference], margin: float) -> Html:
    """Differences with their intervals, one row an arm, around zero; the band is the margin of equivalence.

    What reaches much farther than the others is cut off with an arrow; its numbers stand beside it.
    """
    limit = reach(rows, margin)

    def place(value: float) -> float:
        return 50 + 48 * max(-1.0, min(1.0, value / limit))

    left, width = place(-margin), place(margin) - place(-margin)
    band = element("rect", x=f"{left:.2f}%", width=f"{width:.2f}%", y=0, height="100%", class_="band")
    zero = element("line", x1="50%", x2="50%", y1=0, y2="100%", class_="zero")
    drawn = []
    for row in rows:
        marks = join((band, zero, *_whisker(row, limit, place)))
        said = f"difference {number(row.mean, '+.4f')}, verdict {row.verdict}"
        field = element("svg", marks, class_=f"field {row.verdict}", height=36, role="img", aria_label=said)
        drawn.append(
            element(
                "div",
                element("div", row.name, class_="name"),
                field,
                element("div", row.value, class_="value"),
                class_="row",
            )
        )
    return element("div", *drawn, _forest_scale(limit, place), class_="forest")


def reach(rows: Sequence[Difference], margin: float) -> float:
    """Half the width of a forest plot: all intervals, but none that is far longer than most."""
    ends = [max(abs(v) for v in (r.mean, r.low, r.high, *r.each) if v is not None) for r in rows if r.mean is not None]
    if not ends:
        return 3 * margin
    return max(2.0 * margin, min(max(ends), 4 * float(np.median(ends))))


def _whisker(row: Difference, limit: float, place: Place) -> list[Html]:
    if row.mean is None:
        return [element("text", "no pair of runs", x="50%", y=21, text_anchor="middle")]
    marks = []
    if row.low is not None and row.high is not None:
        x1, x2 = (f"{place(v):.2f}%" for v in (row.low, row.high))
        marks.append(element("line", x1=x1, x2=x2, y1=16, y2=16, class_="whisker"))
        for value, x in ((row.low, x1), (row.high, x2)):
            if abs(value) <= limit:
                marks.append(element("line", x1=x, x2=x, y1=12, y2=20, class_="whisker"))
            else:  # the interval goes on beyond the frame
                mark, anchor = ("◂", "start") if value < 0 else ("▸", "end")
                marks.append(element("text", mark, x="0%" if value < 0 else "100%", y=20, text_anchor=anchor))
    dots = [element("circle", cx=f"{place(v):.2f}%", cy=29, r=2.5, class_="seed") for v in row.each]
    mean = element("circle", cx=f"{place(row.mean):.2f}%", cy=16, r=5, class_="mean")
    return [*marks, *dots, mean]


def _forest_scale(limit: float, place: Place) -> Html:
    places = [v for v in ticks(-limit, limit, 4) if abs(v) <= limit]
    texts = [
        element("text", number(v, "+g") if v else "0", x=f"{place(v):.2f}%", y=14, text_anchor="middle") for v in places
    ]
    sides = (
        element("text", "◂ better", x="0%", y=31, text_anchor="start"),
        element("text", "worse ▸", x="100%", y=31, text_anchor="end"),
        element("text", "nats per token", x="50%", y=31, text_anchor="middle"),
    )
    field = element("svg", *texts, *sides, class_="field", height=36, aria_hidden="true")
    return element("div", element("div"), field, element("div"), class_="row")
