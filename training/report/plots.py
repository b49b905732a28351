"""Pieces of pictures: panels with curves over steps, maps of experts, wrapped text."""

import textwrap
import warnings
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from training.report.series import Columns, Records, gather, numbers, smooth

# Okabe and Ito's palette, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8C4A86", "#5f6368"
NO_ROW, NO_DATA = "#1f1f1f", "#e3e3e3"
FEW = 40  # columns below which a curve shows its points and is not smoothed
OCTAVES = 3  # maps of load tell 1/8 to 8 fair shares apart
MOST_ROWS, MOST_NUMBERED, MOST_NAMED = 640, 64, 16  # rows of a map, cells with their number, layers with their name


def panel(ax: Axes, at: Columns, title: str, unit: str) -> None:
    """Title, axis names, and the steps that the columns span."""
    heading(ax, title, pad=21.0)  # the legend stands between title and frame
    ax.set_ylabel(unit)
    ax.set_xlim(at.edges[0], at.edges[-1])
    _step_axis(ax, at)
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def heading(ax: Axes, title: str, pad: float = 6.0) -> None:
    """A title on the left, `pad` points above the axes."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)


def twin(ax: Axes, unit: str, color: str) -> Axes:
    """A second scale on the right, in the colour of its only curve."""
    right: Axes = ax.twinx()
    right.set_ylabel(unit, color=color)
    right.tick_params(axis="y", colors=color)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(color)
    return right


def curve(
    ax: Axes, history: Records, at: Columns, key: str, color: str, label: str, *, ls: str = "-", scale: float = 1.0
) -> None:
    """The records' `key` times `scale`: means of columns thin, their centred mean bold; points where they are few."""
    y = gather(numbers(history, key), at.starts) * scale
    if not np.isfinite(y).any():
        ax.plot([], [], color=color, ls=ls, lw=2, label=f"{label}: no data")
    elif len(y) <= FEW:
        ax.plot(at.x, y, color=color, ls=ls, lw=1.6, marker="o", ms=3.5, label=label)
    else:
        ax.plot(at.x, y, color=color, lw=0.7, alpha=0.3)
        ax.plot(at.x, smooth(y), color=color, ls=ls, lw=1.9, label=label)


def log_if_wide(ax: Axes, key_values: np.ndarray, ratio: float = 30.0) -> None:
    """A logarithmic scale where all values are positive and span more than `ratio`."""
    known = key_values[np.isfinite(key_values)]
    if known.size and known.min() > 0 and known.max() > ratio * known.min():
        ax.set_yscale("log")


def legend(*axes: Axes) -> None:
    """One legend for axes that lie on each other, between the first one's title and its frame: it hides no curve."""
    known = [ax.get_legend_handles_labels() for ax in axes]
    handles, labels = [h for more, _ in known for h in more], [name for _, more in known for name in more]
    axes[0].legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=max(len(labels), 1), frameon=False,
        fontsize=8.5, borderaxespad=0.2, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip


def load_over_steps(ax: Axes, share: np.ndarray, at: Columns, unit: str) -> None:
    """Image of (columns, L, E) shares: steps to the right, layers and their experts downwards, colour = fair shares."""
    _, layers, experts = share.shape
    per = -(-experts * layers // MOST_ROWS)  # neighbouring experts behind one row of the image
    rows = experts // per + (experts % per > 0)
    if not share.size:
        share = np.full((1, layers, experts), np.nan)
    busiest = np.fmax.reduceat(share, np.arange(rows) * per, axis=2).reshape(len(share), layers * rows).T
    image = ax.pcolorfast(at.edges, np.arange(layers * rows + 1.0), octaves(busiest * experts))
    norm, colors = load_scale()
    image.set(norm=norm, cmap=colors)
    ax.invert_yaxis()
    for layer in range(1, layers if layers <= 64 else 1):
        ax.axhline(layer * rows, color="#9a9a9a", lw=1.6 if layers <= 16 else 0.6)  # seen on black, blue, white and red
    named = range(0, layers, -(-layers // MOST_NAMED))
    ax.set_yticks([(layer + 0.5) * rows for layer in named], [f"layer {layer}" for layer in named])
    ax.tick_params(axis="y", length=0)
    grouped = f" (busiest of {per})" if per > 1 else ""  # neighbours that share a row
    ax.set_ylabel("one expert" if experts == 1 else f"experts 0 to {experts - 1} downwards{grouped}")
    _step_axis(ax, at)
    load_bar(ax, unit)


def octaves(fair_shares: np.ndarray) -> np.ndarray:
    """log2, clipped to the range of the colours; exact zeros, no row at all, stay below the scale."""
    log = np.log2(np.where(fair_shares > 0, fair_shares, 1.0)).clip(-OCTAVES, OCTAVES)
    return np.where(fair_shares > 0, log, np.where(np.isnan(fair_shares), np.nan, -OCTAVES - 1.0))


def load_scale() -> tuple[Normalize, Colormap]:
    """Blue = under-used, white = fair, red = over-used, black = no row, light grey = not recorded."""
    middle = colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))  # its dark ends are hard to tell from black
    return Normalize(-OCTAVES, OCTAVES), ListedColormap(middle).with_extremes(under=NO_ROW, bad=NO_DATA)


def load_bar(ax: Axes, unit: str) -> None:
    """The colour bar of `load_scale` beside the axes."""
    ticks = range(-OCTAVES, OCTAVES + 1)
    names = [f"{2**tick}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks]
    names[0], names[-1] = f"≤{names[0]}", f"≥{names[-1]}"
    bar = _bar(ax, *load_scale(), f"{unit} / fair share (black: none)")
    bar.set_ticks(list(ticks), labels=names)


def heat_map(
    ax: Axes, values: np.ndarray, norm: Normalize, colors: Colormap, numbered: np.ndarray | None = None
) -> None:
    """(L, E) cells, layers down, experts to the right; with the numbers of `numbered` where cells are few."""
    layers, experts = values.shape
    ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colors, aspect="auto", interpolation="nearest")
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if numbered is None or values.size > MOST_NUMBERED or experts > 16:
        return
    for layer in range(layers):
        for expert in range(experts):
            if not numbered[layer, expert] > 0:  # unknown, or none: the colour says so
                continue
            red, green, blue, _ = colors(norm(values[layer, expert]))
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#202020"
            ax.text(expert, layer, _short(numbered[layer, expert]), ha="center", va="center", fontsize=7.5, color=ink)


def surprise_map(ax: Axes, surprise: np.ndarray) -> None:
    """(L, E) mean surprises: NaN = not recorded, 0 = the expert got no row."""
    known = surprise[np.isfinite(surprise) & (surprise > 0)]
    low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
    wide = high > 30 * low
    middle = np.sqrt(low) * np.sqrt(high)  # at least a factor of 1.5 from end to end: small differences look small
    low, high = min(low, middle / 1.25), max(high, middle * 1.25)
    norm = (LogNorm if wide else Normalize)(low, high)
    colors = colormaps["cividis"].with_extremes(under=NO_ROW, bad=NO_DATA)
    shown = np.where(surprise == 0, low / 2, surprise)  # a logarithm knows no zero
    heat_map(ax, shown, norm, colors)  # a text costs as much as ten curves: numbers stand in the map of load only
    _bar(ax, norm, colors, "gradient norm of w2, nats (black: no row)", format="{x:.3g}")


def wrap_to(figure: Figure, text: str, inches: float, **style: Any) -> str:
    """Lines of `text`, each at most `inches` wide in the given style; words longer than a line are broken."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    text, lines = printable(text), ""
    width = max(len(text), 1)  # characters
    while True:
        lines = "\n".join(textwrap.wrap(text, width)) or " "
        probe = figure.text(0, 0, lines, parse_math=False, **style)
        with quiet_glyphs():
            extent = probe.get_window_extent(renderer).width / figure.dpi
        probe.remove()
        if extent <= inches or width == 1:
            return lines
        width = max(1, min(width - 1, int(width * inches / extent)))


def printable(text: str) -> str:
    """The text with a blank for every character that cannot be drawn (line ends, control characters)."""
    return "".join(c if c.isprintable() else " " for c in text)


class quiet_glyphs(warnings.catch_warnings):
    """Within it, characters that the font lacks are drawn as boxes without a warning."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return entered


def _step_axis(ax: Axes, at: Columns) -> None:
    ax.set_xlabel(at.name)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _bar(ax: Axes, norm: Normalize, colors: Colormap, label: str, format: str | None = None) -> Any:
    place = ax.inset_axes((1.02, 0.0, 0.03, 1.0))
    bar = ax.figure.colorbar(ScalarMappable(norm, colors), cax=place, extend="min", format=format)
    bar.set_label(label, fontsize=9)
    bar.outline.set_visible(False)
    place.tick_params(labelsize=8.5)
    return bar


def _short(value: float) -> str:
    """A positive number in about four characters, as narrow as a cell."""
    if 1e-3 <= value < 9999.5:
        return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}".removeprefix("0")
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
