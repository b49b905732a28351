"""Charts of a page: specifications for plotly, the same in words, and the numbers for a reader without scripts.

Colours stand as var(--name) of the style sheet, which the page's script looks up by day and by night. Slot 0 is grey,
slots 1 to 7 are colours, later ones are the same colours dashed. Frames are what a panel's slider chooses among.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.report.digest import TABLES, Curve, Digest
from training.report.html.wording import NOTHING, bounds, level_note, number, plural, printable

COLOURS, DASHES = 7, ("solid", "dash", "dot", "longdashdot")
FEW = 25  # points of a curve that are marked one by one
OUTLIER = 10.0  # values this many times the range of 95 % of the others are cut off
LOAD, SURPRISE = TABLES.index("expert_load"), TABLES.index("expert_surprise")
ROW = 46  # pixels of a row of a forest plot
NAME = 30  # most characters of a name within a figure
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
    colour, dash = _look(slot)
    return f"c{colour} d{dash}" if dash else f"c{colour}"


def _look(slot: int) -> tuple[int, int]:
    return (0, 0) if slot == 0 else ((slot - 1) % COLOURS + 1, (slot - 1) // COLOURS % len(DASHES))


def text_of(value: object, most: int = 60) -> str:
    """Text as plotly shows it, which reads markup: escaped, and cut where it is long."""
    text = printable(value)
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}\u2026")


def rounded(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Nested lists of numbers with so many significant digits, None for what is unknown."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values)
    with np.errstate(divide="ignore"):
        power = digits - 1 - np.floor(np.log10(np.abs(np.where(known & (values != 0), values, 1.0))))
    scale = 10.0 ** np.minimum(power, 300.0)
    short = np.where(known, np.round(np.where(known, values, 0.0) * scale) / scale, 0.0)
    out: list[Any] = np.where(known, short.astype(object), np.array(None)).tolist()
    return out


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
        "shapes": [_level(*level) for level in (levels or {}).items()],
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


def surprise_histograms(title: str, of: Sequence[tuple[Line, Sequence[Digest]]], bins: int = 24) -> Chart:
    """Share of each layer's last rows by the mean surprise of the expert that they went to; a frame a layer."""
    unit = "share of the layer's last rows"
    known = np.concatenate([_known(d.window[SURPRISE]) for _, digests in of for d in digests] or [np.zeros(0)])
    if not known.size:
        return Chart(title, unit, "no surprise is on record", {}, (), ())
    low, high = float(known.min()), float(known.max())
    edges = np.geomspace(low, high, bins + 1) if high > low else np.array([low / 2, low * 2])
    middle = np.sqrt(edges[1:] * edges[:-1])
    layers = max(d.window.shape[2] for _, digests in of for d in digests)
    lines = []
    for line, digests in of:
        counts = np.zeros((layers, len(middle)))
        for d in digests:
            for layer in range(d.window.shape[2]):
                values, rows = d.window[SURPRISE, :, layer], d.window[LOAD, :, layer]
                at = (np.nan_to_num(values) > 0) & np.isfinite(rows)
                counts[layer] += np.histogram(values[at].clip(low, high), edges, weights=rows[at])[0]
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-30)
        lines.append((line, Curve(middle, middle, share)))
    chart = _layered(title, unit, lines)
    for trace in chart.spec["data"]:
        trace |= {
            "mode": "lines",
            "line": {**trace["line"], "shape": "hvh"},
            "fill": "tozeroy" if len(of) == 1 else "none",
        }
    rows = []
    for line, curve in lines:
        tops = curve.step[curve.y.argmax(axis=1)]
        rows.append([line.name, *(number(float(top), ".3g") for top in tops)])
    head = ("most rows at, nats", *(f"layer {i}" for i in range(layers)))
    said = f"{title}: most rows lie at, in nats; " + "; ".join(f"{name} {', '.join(values)}" for name, *values in rows)
    axis = {"xaxis": {"type": "log", "dtick": "D2", "title": {"text": "surprise, nats"}}}
    return chart._replace(spec={**chart.spec, "layout": axis, "over": ""}, head=head, rows=rows, said=said)


def _known(surprise: np.ndarray) -> np.ndarray:
    return surprise[np.nan_to_num(surprise) > 0]


def _trace(line: Line, curve: Curve, y: list[Any]) -> dict[str, Any]:
    colour, dash = _look(line.slot)
    few = curve.y.shape[-1] <= FEW
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": text_of(line.name),
        "x": rounded(curve.step, 9), "y": y, "line": {"color": f"var(--c{colour})", "dash": DASHES[dash]},
        "meta": {"arm": line.arm, "seconds": rounded(curve.seconds), "label": text_of(line.name, NAME)},
    }  # fmt: skip


def _level(name: str, value: float) -> dict[str, Any]:
    label = {
        "text": text_of(f"{name} {value:.3g}"),
        "textposition": "start",
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
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        y, value = len(rows) - place, _in_words(row.pair)
        notes += [
            _beside(row, text_of(row.name, NAME), y, 0),
            _beside(row, value if row.pair["difference"] is not None else "no pair of runs", y, 1),
        ]
        if row.pair["difference"] is not None:
            data += _whisker(row, y, limit, value)
    band = {
        "type": "rect",
        "yref": "paper",
        "x0": -margin,
        "x1": margin,
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"width": 0},
        "fillcolor": "var(--band)",
    }
    title = "\u25c2 better &nbsp; nats per token &nbsp; worse \u25b8"
    layout = {
        "height": ROW * len(rows) + 60, "shapes": [band], "annotations": notes, "hovermode": "closest",
        "xaxis": {"range": [-1.04 * limit, 1.04 * limit], "title": {"text": title}, "zeroline": True},
        "yaxis": {"range": [0.4, len(rows) + 0.6], "visible": False, "fixedrange": True},
        "margin": {"l": 6, "r": 6},
    }  # fmt: skip
    table = [[row.name, row.pair["verdict"], *_numbers(row.pair)] for row in rows]
    said = "; ".join(f"{name}: {verdict}, {mean}" for name, verdict, mean, _ in table)
    return Chart(
        f"compared with {baseline}",
        "",
        f"differences to {baseline}: {said}",
        {"data": data, "layout": layout},
        ("arm", "verdict", "difference", "interval"),
        table,
    )


def reach(rows: Sequence[Difference], margin: float) -> float:
    """Half the width of a forest plot: all intervals, but none that is far longer than most."""
    values = [(row.pair["difference"], row.pair["low"], row.pair["high"], *row.each) for row in rows]
    ends = [max(abs(v) for v in of_row if v is not None) for of_row in values if of_row[0] is not None]
    return max(2.0 * margin, min(max(ends), 4 * float(np.median(ends)))) if ends else 3 * margin


def _numbers(pair: Mapping[str, Any]) -> tuple[str, str]:
    interval = bounds(pair["low"], pair["high"], "+.4f") + level_note(pair) or "no interval"
    return number(pair["difference"], "+.4f"), interval


def _in_words(pair: Mapping[str, Any]) -> str:
    return f"{number(pair['difference'], '+.4f')} {pair['verdict']}"


def _beside(row: Difference, text: str, y: int, side: int) -> dict[str, Any]:
    """Text above a row, at its left (0) or right (1) end."""
    colour = "var(--ink)" if side == 0 else f"var(--{row.pair['verdict']})"
    return {
        "name": row.arm, "text": text, "xref": "paper", "x": side, "y": y + 0.24, "showarrow": False,
        "xanchor": "right" if side else "left", "yanchor": "middle", "font": {"color": colour},
    }  # fmt: skip


def _whisker(row: Difference, y: int, limit: float, value: str) -> list[dict[str, Any]]:
    """Mean with its interval, which ends in an arrow where it goes on beyond the frame; every pair below it."""
    mean, low, high = (row.pair[key] for key in ("difference", "low", "high"))
    colour, meta = f"var(--c{_look(row.slot)[0]})", {"arm": row.arm}
    hover = f"{text_of(row.name)}: {value}, {_numbers(row.pair)[1]}<extra></extra>"
    traces = []
    if low is not None and high is not None:
        ends = [max(low, -limit), min(high, limit)]
        marks = ["line-ns" if low >= -limit else "triangle-left", "line-ns" if high <= limit else "triangle-right"]
        marker = {"symbol": marks, "size": 9, "color": colour, "line": {"width": 2, "color": colour}}
        traces.append(
            {
                "mode": "lines+markers",
                "x": ends,
                "y": [y - 0.08] * 2,
                "marker": marker,
                "line": {"color": colour, "width": 2},
            }
        )
    traces.append(
        {
            "mode": "markers",
            "x": [min(max(mean, -limit), limit)],
            "y": [y - 0.08],
            "marker": {"size": 11, "color": colour},
        }
    )
    out = [{"type": "scatter", "meta": meta, "hovertemplate": hover, **trace} for trace in traces]
    pairs = {
        "mode": "markers",
        "x": [*row.each],
        "y": [y - 0.3] * len(row.each),
        "marker": {"size": 5, "color": colour, "opacity": 0.7},
    }
    return [
        *out,
        {
            "type": "scatter",
            "meta": meta,
            "hovertemplate": f"{text_of(row.name)}, one pair: %{{x:+.4f}}<extra></extra>",
            **pairs,
        },
    ]
