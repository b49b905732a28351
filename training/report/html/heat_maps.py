"""Heat maps of a page: (L, E) tables of experts and other matrices, as levels of a scale of seven colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from training.report.digest import Digest, table_at_end, tables_over_steps
from training.report.html.charts import Chart, rounded, text_of
from training.report.html.wording import NOTHING, number, plural

OCTAVES = 3  # maps of load tell 1/8 to 8 fair shares apart
MOST_EXPERTS = 128  # columns of a map; beyond it neighbours share one
TOP = 6  # the highest level
NO_ROW = -1.0  # the level of an expert without rows; NaN is a level that is not known
SCALES = {  # from level 0 to TOP, the same by day and by night; h for load and agreement, s from low to high
    "h": ("#1d5fa6", "#5a97c9", "#b3d1e6", "#f4f3f1", "#f3bd9f", "#d6705a", "#a31f30"),
    "s": ("#1a3c6e", "#3c4f73", "#5f6377", "#7d7a77", "#a19470", "#c9b25c", "#f2d53f"),
}
BLACK, GREY = "#111111", "#a9afb7"  # no row; not known
HEAD = ("layer", "highest", "of expert", "mean", "lowest", "without a row")
WIDE = 30.0  # beyond this ratio of largest to smallest, shades are spaced by the logarithm
Scale = tuple[float, float]  # lowest and highest surprise of a set of maps
Legend = Sequence[tuple[str, str]]  # name and class of each colour


def expert_map(title: str, digest: Digest | None, key: str, frames: int, scale: Scale, **of: Any) -> Chart:
    """Heat map of a run's experts, at the end and over steps: load or mean surprise per layer and expert.

    Load is in fair shares, 1 = an even split over the experts of the layer. `of` are more fields of the chart.
    """
    of = {"unit": "", **of}
    end = None if digest is None else table_at_end(digest, key)
    if digest is None or end is None:
        return Chart(title, said="no record", spec={}, head=(), rows=(), **of)
    surprise = key == "expert_surprise"
    unit, per = ("nats", 1) if surprise else ("fair shares", end.shape[1])
    over_steps = [(f"to step {step:,}", table * per) for step, table in tables_over_steps(digest, key, frames)[:-1]]
    tables = [*over_steps, ("at the end", end * per)]
    drawn = [(name, shades(table, scale) if surprise else load_levels(table), table) for name, table in tables]
    spec = level_map(drawn, "s" if surprise else "h", unit, ("layer", "expert"))
    rows = [_layer_row(str(layer), row) for layer, row in enumerate(end * per)]
    said, note = _said(end * per, unit)
    return Chart(title, said=f"{unit}: {said}", spec=spec, head=HEAD, rows=rows, note=note, **of)


def _layer_row(layer: str, values: np.ndarray) -> list[str]:
    """One layer in numbers, as HEAD has them."""
    used, idle = values[np.nan_to_num(values) > 0], str(int((values == 0).sum()))
    if not used.size:
        return [layer, *[NOTHING] * 4, idle]
    high, mean, low = (number(float(v), ".3g") for v in (used.max(), used.mean(), used.min()))
    return [layer, high, str(int(np.nanargmax(values))), mean, low, idle]


def _said(values: np.ndarray, unit: str) -> tuple[str, str]:
    """A map in words, and the note below it."""
    layers, experts = values.shape
    said = f"{plural(layers, 'layer')} down, {plural(experts, 'expert')} across"
    if (np.nan_to_num(values) > 0).any():
        said += f"; the highest is {np.nanmax(values):.3g} {unit}, {(values == 0).sum()} of {values.size} got no row"
    per = -(-experts // MOST_EXPERTS)
    return said, said + (f"; a cell is the highest of {per} neighbours" if per > 1 else "")


# Levels ---------------------------------------------------------------------------------------------------------------


def load_levels(fair: Float[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Fair shares -> levels 0 to TOP: an eighth, a quarter, ... eight fair shares."""
    level = np.log2(np.where(fair > 0, fair, 1.0)).clip(-OCTAVES, OCTAVES) + OCTAVES
    return np.where(np.isnan(fair), np.nan, np.where(fair > 0, level, NO_ROW))


def surprise_scale(digests: Sequence[Digest]) -> Scale:
    """Lowest and highest surprise of the tables at the end."""
    tables = [table for digest in digests if (table := table_at_end(digest, "expert_surprise")) is not None]
    known = np.concatenate([table[np.nan_to_num(table) > 0] for table in tables] or [np.zeros(0)])
    return (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)


def shades(values: Float[np.ndarray, "*axes"], scale: Scale) -> Float[np.ndarray, "*axes"]:
    """Map surprise to colour levels from 0 to TOP, logarithmic where the scale is wide; NO_ROW where it is 0."""
    low, high = scale
    known = np.where(values > 0, values, low)
    wide = high > WIDE * low
    share = np.log(known / low) / np.log(high / low) if wide else (known - low) / max(high - low, 1e-12)
    return np.where(np.isnan(values), np.nan, np.where(values > 0, TOP * share.clip(0, 1), NO_ROW))


def load_legend() -> Legend:
    """Colours of maps of load."""
    powers = [f"{2**i}" if i >= 0 else f"1/{2**-i}" for i in range(-OCTAVES, OCTAVES + 1)]
    powers[0], powers[-1] = f"\u2264 {powers[0]}", f"\u2265 {powers[-1]} fair shares"
    return [
        *((name, f"h{level}") for level, name in enumerate(powers)),
        ("no row", "none"),
        ("not recorded", "unknown"),
    ]


def surprise_legend(scale: Scale) -> Legend:
    """Colours of maps of surprise."""
    edges = np.geomspace(*scale, TOP + 1) if scale[1] > WIDE * scale[0] else np.linspace(*scale, TOP + 1)
    return [
        *((f"{edge:.3g}{' nats' * (level == TOP)}", f"s{level}") for level, edge in enumerate(edges)),
        ("no row", "none"),
    ]


# Pictures -------------------------------------------------------------------------------------------------------------


def level_map(
    frames: Sequence[tuple[str, np.ndarray, np.ndarray]],
    kind: str,
    unit: str,
    axes: tuple[str, str],
    *,
    names: Sequence[str] = (),
    digits: int = 0,
) -> dict[str, Any]:
    """Cells coloured by their level; hovering shows the value. Several frames (name, levels, values) get a slider.

    Args:
        kind: `h` or `s` of SCALES; unit: of the values; axes: what goes down and across.
        names: of rows and columns, their numbers if none; digits: behind the point of a cell's number, 0 for none.
    """
    stops = [[0.0, BLACK], [0.5 / (TOP + 1), BLACK], [0.5 / (TOP + 1), SCALES[kind][0]]]
    stops += [[(level + 1) / (TOP + 1), colour] for level, colour in enumerate(SCALES[kind])]
    rows, columns = frames[0][1].shape
    per = -(-columns // MOST_EXPERTS)
    at = np.arange(0, columns, per)
    parts = [
        {
            "z": [
                [None if v != v else v for v in row]
                for row in np.round(np.fmax.reduceat(levels, at, axis=1), 2).tolist()
            ],
            "customdata": rounded(np.fmax.reduceat(values, at, axis=1), 4),
        }
        for _, levels, values in frames
    ]
    trace: dict[str, Any] = {
        "type": "heatmap", "zmin": -1, "zmax": TOP, "colorscale": stops, "showscale": False, "dx": per, **parts[-1],
        "hovertemplate": f"{axes[0]} %{{y}}, {axes[1]} %{{x}}: %{{customdata:.4~g}} {unit}<extra></extra>",
        "hoverongaps": False,
    }  # fmt: skip
    height = 26 if names or digits else max(4, min(18, 216 // rows))
    ticks = {"tickvals": [*range(rows)], "ticktext": [text_of(name, 12) for name in names]} if names else {}
    down = ticks or {"dtick": -(-rows // 6)}
    if digits:
        text = [[f"{value:.{digits}f}" for value in row] for row in frames[-1][2].tolist()]
        trace |= {"text": text, "texttemplate": "%{text}"}
    layout = {
        "height": rows * height + 48, "plot_bgcolor": GREY, "hovermode": "closest",
        "xaxis": {"title": {"text": axes[1]}, **ticks},
        "yaxis": {"title": {"text": axes[0]}, "autorange": "reversed", **down},
    }  # fmt: skip
    spec: dict[str, Any] = {"data": [trace], "layout": layout, "map": True}
    if len(frames) > 1:
        spec["frames"] = [{"name": name, "data": [part]} for (name, _, _), part in zip(frames, parts, strict=True)]
    return spec
