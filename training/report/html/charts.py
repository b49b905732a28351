"""Charts of a page: specifications for plotly, the same in words, and the numbers for a reader without scripts.

Colours stand as var(--name) of the style sheet, which the page's script looks up by day and by night. Slot 0 is grey,
slots 1 to 7 are colours, later ones are the same colours dashed. Frames are what a panel's slider chooses among.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.report.digest import Curve
from training.report.html.wording import NOTHING, bounds, level_note, number, plural, printable
from training.report.series import LARGEST

COLOURS, DASHES = 7, ("solid", "dash", "dot", "longdashdot")
FEW = 25  # points of a curve that are marked one by one
OUTLIER = 10.0  # values this many times the range of 95 % of the others are cut off
ROW = 46  # pixels of a row of a forest plot
NAME = 24  # most characters of a name within a figure
Head = Sequence[str]
Rows = Sequence[Sequence[str]]


class Chart(NamedTuple):
    """One figure of a page."""

    title: str
    unit: str
    said: str  # text alternative
    spec: Mapping[str, Any]  # data and layout of plotly, frames; {} where nothing can be drawn
    head: Head  # of the table that stands in for the figure
    rows: Rows
    note: str = ""
    arm: str = ""  # that the figure is of, if it is of one alone
    slot: int | None = None  # of that arm
    legend: Sequence[tuple[str, str, int, str]] = ()  # label, name, slot and note of its lines, where the page has none


class Line(NamedTuple):
    """One line of a chart."""

    arm: str
    name: str
    slot: int
    curve: Curve | None


class Difference(NamedTuple):
    """One row of a forest plot."""

    arm: str
    name: str
    slot: int
    pair: Mapping[str, Any]  # of analysis["against_baseline"]
    each: Sequence[float]  # of every pair of runs


def slot_class(slot: int) -> str:
    """Classes of a slot's colour and dashes."""
    colour, dash = look(slot)
    return f"c{colour} d{dash}" if dash else f"c{colour}"


def look(slot: int) -> tuple[int, int]:
    """Colour and dashes of a slot."""
    return (0, 0) if slot == 0 else ((slot - 1) % COLOURS + 1, (slot - 1) // COLOURS % len(DASHES))


def text_of(value: object, most: int = 60) -> str:
    """Text as plotly shows it, which reads markup: escaped, and cut where it is long."""
    text = printable(value)
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}\u2026")


def rounded(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Nested lists of numbers with so many significant digits, None for what is unknown."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{v:.{digits}g}") if abs(v) < LARGEST else None for v in values.tolist()]


# Curves ---------------------------------------------------------------------------------------------------------------


def curve_chart(
    title: str, unit: str, lines: Sequence[Line], *, empty: str = "no data", levels: Mapping[str, float] | None = None
) -> Chart:
    """Curves over steps; `levels` are named horizontal lines. Curves of many layers get a frame a layer."""
    known = [(line, line.curve) for line in lines if line.curve is not None and line.curve.y.size]
    if not known:
        return Chart(title, unit, empty, {}, (), ())
    if known[0][1].y.ndim == 2:
        return _layered(title, unit, known)
    ys = [curve.y for _, curve in known]
    window, cut = _range(np.concatenate(ys), list((levels or {}).values()))
    layout: dict[str, Any] = {
        "yaxis": {"range": window} if window else {},
        "shapes": [
            _level(*level, place) for place, level in enumerate(sorted((levels or {}).items(), key=lambda of: of[1]))
        ],
    }
    rows = [[line.name, *(number(v, ".4g") for v in (curve.y[0], curve.y.min(), curve.y[-1]))] for line, curve in known]
    rows += [[name, NOTHING, NOTHING, number(value, ".4g")] for name, value in (levels or {}).items()]
    said = f"{title}, {unit}: " + "; ".join(f"{row[0]} from {row[1]} to {row[3]}" for row in rows[: len(known)])
    note = "Values beyond the frame are cut off; a double click shows all." if cut else ""
    spec = {"data": [_trace(line, curve, rounded(curve.y)) for line, curve in known], "layout": layout, "over": "step"}
    return Chart(title, unit, said, spec, ("", "first", "lowest", "last"), rows, note)


def _layered(title: str, unit: str, known: Sequence[tuple[Line, Curve]]) -> Chart:
    """The same chart of every layer."""
    layers = max(len(curve.y) for _, curve in known)
    ys = [[*rounded(curve.y), *[[]] * (layers - len(curve.y))] for _, curve in known]
    frames = [{"name": f"layer {i}", "data": [{"y": y[i]} for y in ys]} for i in range(layers)]
    rows = [[line.name, *(number(y[-1], ".4g") for y in curve.y)] for line, curve in known]
    said = f"{title}, {unit}, of {plural(layers, 'layer')}; at the end: "
    said += "; ".join(f"{name} {', '.join(values)}" for name, *values in rows)
    data = [_trace(line, curve, []) for line, curve in known]
    spec = {"data": data, "layout": {}, "frames": frames, "over": "step"}
    return Chart(title, unit, said, spec, ("at the end", *(f"layer {i}" for i in range(layers))), rows)


def surprise_histograms(title: str, lines: Sequence[Line]) -> Chart:
    """Share of each layer's last rows by the mean surprise of the expert that they went to; a frame a layer."""
    unit = "share of the layer's last rows"
    known = [(line, line.curve) for line in lines if line.curve is not None and line.curve.y.size]
    if not known:
        return Chart(title, unit, "no surprise is on record", {}, (), ())
    chart = _layered(title, unit, known)
    shape = {"mode": "lines", "fill": "tozeroy" if len(lines) == 1 else "none"}
    data = [trace | shape | {"line": {**trace["line"], "shape": "hvh"}} for trace in chart.spec["data"]]
    layout = {"xaxis": {"type": "log", "title": {"text": "surprise, nats"}}}
    tops = [curve.step[curve.y.argmax(axis=1)].tolist() for _, curve in known]
    rows = [
        [line.name, *(number(top, ".3g") for top in of_line)] for (line, _), of_line in zip(known, tops, strict=True)
    ]
    said = f"{title}: most rows lie at, in nats; " + "; ".join(f"{name} {', '.join(values)}" for name, *values in rows)
    spec = {"data": data, "layout": layout, "frames": chart.spec["frames"], "over": ""}
    return chart._replace(spec=spec, head=("most rows at, nats", *chart.head[1:]), rows=rows, said=said)


def _trace(line: Line, curve: Curve, y: list[Any]) -> dict[str, Any]:
    colour, dash = look(line.slot)
    few = curve.y.shape[-1] <= FEW
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": text_of(line.name),
        "x": rounded(curve.step, 9), "y": y, "line": {"color": f"var(--c{colour})", "dash": DASHES[dash]},
        "meta": {"arm": line.arm, "seconds": rounded(curve.seconds), "label": text_of(line.name, NAME)},
    }  # fmt: skip


def _level(name: str, value: float, place: int) -> dict[str, Any]:
    """A horizontal line; neighbours have their names in different places."""
    label = {
        "text": text_of(f"{name} {value:.3g}"),
        "textposition": ("start", "middle", "end")[place % 3],
        "yanchor": "bottom",
        "font": {"color": "var(--soft)"},
    }
    line = {"color": "var(--soft)", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line, "label": label}


def _range(values: np.ndarray, levels: Sequence[float]) -> tuple[list[float] | None, bool]:
    """Range of the vertical axis and True if values lie beyond it: a few outliers do not flatten all other values.

    None leaves the range to plotly, which does not see to the names of levels.
    """
    low, usual, high = (float(v) for v in (values.min(), np.percentile(values, 95), values.max()))
    cut = high - low > OUTLIER * (usual - low) > 0
    if not cut and not levels:
        return None, False
    high = low + 1.2 * (usual - low) if cut else high
    low, high = min([low, *levels]), max([high, *levels])
    room = 0.05 * (high - low) or 0.5
    return [0.0 if 0 <= low < room else low - room, high + 2 * room], cut


# Differences ----------------------------------------------------------------------------------------------------------


def forest(baseline: str, rows: Sequence[Difference], margin: float) -> Chart:
    """Differences with their intervals, one row an arm, around zero; the band is the margin of equivalence."""
    limit = reach(rows, margin)
    data, notes = [], []
    for y, row in zip(range(len(rows), 0, -1), rows, strict=True):
        data += _whisker(row, y, limit) if row.pair["difference"] is not None else []
        notes += [_beside(row, row.name, y, 0), _beside(row, _in_words(row.pair), y, 1)]
    band = {
        "type": "rect", "yref": "paper", "x0": -margin, "x1": margin, "y0": 0, "y1": 1, "layer": "below",
        "line": {"width": 0}, "fillcolor": "var(--band)",
    }  # fmt: skip
    title = {"text": "\u25c2 better &nbsp; nats per token &nbsp; worse \u25b8"}
    layout = {
        "height": ROW * len(rows) + 60, "shapes": [band], "annotations": notes, "hovermode": "closest",
        "xaxis": {"range": [-1.04 * limit, 1.04 * limit], "title": title, "zeroline": True},
        "yaxis": {"range": [0.4, len(rows) + 0.6], "visible": False, "fixedrange": True}, "margin": {"l": 6, "r": 6},
    }  # fmt: skip
    table = [[row.name, row.pair["verdict"], *_numbers(row.pair)] for row in rows]
    said = f"differences to {baseline}: " + "; ".join(f"{name}: {verdict}, {mean}" for name, verdict, mean, _ in table)
    head = ("arm", "verdict", "difference", "interval")
    return Chart(f"compared with {baseline}", "", said, {"data": data, "layout": layout}, head, table)


def reach(rows: Sequence[Difference], margin: float) -> float:
    """Half the width of a forest plot: all intervals, but none that is far longer than most."""
    values = [(row.pair["difference"], row.pair["low"], row.pair["high"], *row.each) for row in rows]
    ends = [max(abs(v) for v in of_row if v is not None) for of_row in values if of_row[0] is not None]
    return max(2.0 * margin, min(max(ends), 4 * float(np.median(ends)))) if ends else 3 * margin


def _numbers(pair: Mapping[str, Any]) -> tuple[str, str]:
    interval = bounds(pair["low"], pair["high"], "+.4f") + level_note(pair)
    interval = interval or ("no pair of runs" if pair["difference"] is None else "no interval")
    return number(pair["difference"], "+.4f"), interval


def _in_words(pair: Mapping[str, Any]) -> str:
    known = pair["difference"] is not None
    return f"{number(pair['difference'], '+.4f')} {pair['verdict']}" if known else "no pair of runs"


def _beside(row: Difference, text: str, y: int, side: int) -> dict[str, Any]:
    """Text above a row, at its left (0) or right (1) end."""
    colour = f"var(--{row.pair['verdict']})" if side else "var(--ink)"
    return {
        "name": row.arm, "text": text_of(text, NAME), "xref": "paper", "x": side, "y": y + 0.24, "showarrow": False,
        "xanchor": ("left", "right")[side], "align": ("left", "right")[side], "font": {"color": colour},
    }  # fmt: skip


def _whisker(row: Difference, y: int, limit: float) -> list[dict[str, Any]]:
    """Mean with its interval, which ends in an arrow where it goes on beyond the frame; every pair below it."""
    mean, low, high = (row.pair[key] for key in ("difference", "low", "high"))
    colour = f"var(--c{look(row.slot)[0]})"

    def marks(x: Sequence[float], down: float, size: int, texts: list[str], **more: Any) -> dict[str, Any]:
        marker = {"size": size, "color": colour, **more.pop("marker", {})}
        shown = {"x": np.clip(x, -limit, limit).tolist(), "y": [y - down] * len(x), "marker": marker}
        said = {"hoverinfo": "text", "text": [text_of(text, 200) for text in texts], "meta": {"arm": row.arm}}
        return {"type": "scatter", "mode": "markers", **shown, **said, **more}

    said = f"{row.name}: {_in_words(row.pair)}, {_numbers(row.pair)[1]}"
    traces = [marks([mean], 0.08, 11, [said])]
    if low is not None and high is not None:
        ends = ["line-ns" if low >= -limit else "triangle-left", "line-ns" if high <= limit else "triangle-right"]
        line = {"width": 2, "color": colour}
        marker = {"symbol": ends, "line": line}
        traces.append(marks([low, high], 0.08, 9, [said] * 2, mode="lines+markers", line=line, marker=marker))
    pairs = [f"{row.name}, one pair: {number(value, '+.4f')}" for value in row.each]
    return [*traces, *([marks(row.each, 0.3, 5, pairs, opacity=0.7)] if pairs else [])]
