"""Maps of experts for a page: the last records of a run -> (L, E) tables -> figures with a line of words."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from training.report.alarms import WINDOW
from training.report.html.elements import Html, element, escaped
from training.report.series import Records, gather, table_shape, tables

OCTAVES = 3  # maps of load tell 1/8 to 8 fair shares apart
MOST_EXPERTS = 128  # columns of a map; beyond it neighbours share one
NONE, UNKNOWN = -1, -2  # levels of a map: the expert got no row; nothing was recorded
SHADES = 7  # of a map of surprise
WIDE = 30.0  # beyond this ratio of largest to smallest, shades are spaced by the logarithm


def last_tables(history: Records, key: str) -> Float[np.ndarray, "layers experts"] | None:
    """Mean table of the last WINDOW records, NaN where nothing is known; None if no record has one."""
    window = history[-WINDOW:]
    shape = table_shape(window, (key,))
    if shape is None:
        return None
    return gather(tables(window, key, shape), np.zeros(1, dtype=np.int64))[0]


def load_map(title: object, load: Float[np.ndarray, "layers experts"] | None) -> Html:
    """Heat map of rows per expert, in fair shares (1 = an even split over the experts of the layer)."""
    if load is None:
        return element("figure", element("figcaption", title), element("p", "no record", class_="note"))
    layers, experts = load.shape
    said = f"{_plural(layers, 'layer')} down, {_plural(experts, 'expert')} across"
    if np.isfinite(load).any():
        said += f"; the busiest takes {np.nanmax(load) * experts:.1f} fair shares, "
        said += f"{(load == 0).sum()} of {load.size} got no row"
    picture = heat_map(load_levels(load), "h", f"load: {said}")
    return element(
        "figure", element("figcaption", title), picture, element("p", said, _grouped(experts), class_="note")
    )


def load_legend() -> Html:
    """Colours of `load_map`."""
    powers = [f"{2**i}" if i >= 0 else f"1/{2**-i}" for i in range(-OCTAVES, OCTAVES + 1)]
    powers[0], powers[-1] = f"≤ {powers[0]}", f"≥ {powers[-1]} fair shares"
    names = [*zip(powers, range(len(powers)), strict=True), ("no row", NONE), ("not recorded", UNKNOWN)]
    return map_legend(names, "h")


def surprise_map(title: object, surprise: Float[np.ndarray, "layers experts"] | None) -> Html:
    """Mean surprise of each expert's rows; 0 = it got none. With its own legend: the scale is that of the map."""
    if surprise is None:
        return load_map(title, None)
    known = surprise[np.isfinite(surprise) & (surprise > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    logarithmic = high > WIDE * low
    edges = np.geomspace(low, high, SHADES) if logarithmic else np.linspace(low, high, SHADES)
    nearest = np.abs(np.nan_to_num(surprise)[..., None] - edges).argmin(axis=-1)
    levels = np.where(np.isnan(surprise), UNKNOWN, np.where(surprise > 0, nearest, NONE))
    picture = heat_map(levels, "s", f"{title}: {low:.3g} to {high:.3g} nats")
    names = [(f"{edge:.3g}", level) for level, edge in enumerate(edges) if level % 3 == 0]
    legend = map_legend([*names, ("no row", NONE)], "s")
    return element("figure", element("figcaption", title), picture, legend, _grouped(surprise.shape[1]))


def alarm_counts(alarms: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """Kind of alarm (what stands before its colon) -> how many runs ring it, most frequent first."""
    kinds = [kind for of_run in alarms for kind in {alarm.partition(":")[0] for alarm in of_run}]
    return sorted(((kind, kinds.count(kind)) for kind in set(kinds)), key=lambda entry: (-entry[1], entry[0]))


def _grouped(experts: int) -> Html:
    per = -(-experts // MOST_EXPERTS)
    return escaped(f"; a cell is the busiest of {per} neighbours" if per > 1 else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# Cells ----------------------------------------------------------------------------------------------------------------


def load_levels(load: Float[np.ndarray, "layers experts"]) -> Int[np.ndarray, "layers experts"]:
    """Shares of routed rows -> levels 0 to 6: an eighth, a quarter, ... eight fair shares, rounded; NONE, UNKNOWN."""
    fair = load * load.shape[1]
    level = np.rint(np.log2(np.where(fair > 0, fair, 1.0))).clip(-OCTAVES, OCTAVES).astype(np.int64) + OCTAVES
    return np.where(np.isnan(load), UNKNOWN, np.where(fair > 0, level, NONE))


def heat_map(levels: Int[np.ndarray, "layers experts"], kind: str, said: str) -> Html:
    """(L, E) cells, layers downwards and experts to the right. `kind` h: levels of load; s: from low to high."""
    layers, experts = levels.shape
    per = -(-experts // MOST_EXPERTS)  # the highest level of neighbours
    levels = np.maximum.reduceat(levels, np.arange(0, experts, per), axis=1)
    cells: dict[int, list[str]] = {}
    for layer, row in enumerate(levels.tolist()):
        start = 0
        for expert in range(1, len(row) + 1):
            if expert == len(row) or row[expert] != row[start]:
                cells.setdefault(row[start], []).append(f"M{start} {layer}h{expert - start}v1h{start - expert}z")
                start = expert
    paths = [
        element("path", d="".join(segments), class_=level_class(level, kind))
        for level, segments in sorted(cells.items())
    ]
    height = layers * max(4, min(18, 216 // layers))
    return element(
        "svg", *paths, width="100%", height=height, viewBox=f"0 0 {levels.shape[1]} {layers}",
        preserveAspectRatio="none", shape_rendering="crispEdges", role="img", aria_label=said,
    )  # fmt: skip


def level_class(level: int, kind: str) -> str:
    """The style sheet's class of a level."""
    return {NONE: "none", UNKNOWN: "unknown"}.get(level, f"{kind}{level}")


def map_legend(names: Sequence[tuple[str, int]], kind: str) -> Html:
    """Legend of a heat map: colour and name of each level."""

    def sample(level: int) -> Html:
        cell = element("rect", width=16, height=12, class_=level_class(level, kind))
        return element("svg", cell, width=16, height=12, aria_hidden="true")

    return element("ul", *(element("li", sample(level), name) for name, level in names), class_="legend")
