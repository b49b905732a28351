"""Pictures of a run: core metrics (3 x 2 curves) and the expert dashboard (2 x 2 maps), drawn from its records.

Figures are made by `*_figure` and saved by `draw_*`. No pyplot, so nothing is global. Records may lack keys or hold
None (nothing is drawn there); any number of them is drawn in at most COLUMNS columns.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from training.report import plots
from training.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, curve, legend, panel, printable, twin
from training.report.series import Columns, Records, column_tables, columns, gather, numbers, table_shape, tables
from training.storage.atomic import write_bytes

COLUMNS = 800  # most points of a curve, most columns of a map
WINDOW = 20  # records behind the heat maps
DPI, WIDTH = 100, 14.0  # inches: pictures are 1400 pixels wide
NUMBERS_READ = 1_000_000  # most entries of a map that are read
MARGIN = 0.3  # inches
ALARM = "#b3261e"
NO_ALARM = "no collapse alarm"
FOOTNOTE = "Within one token the w2 ranking is argmin(weight * ||h||): it does not depend on the loss."


def draw_core_metrics(
    history: Records, path: str | Path, *, title: str = "Core metrics", baselines: Mapping[str, float] | None = None
) -> None:
    """Save `core_metrics_figure` as a PNG; the file is replaced in one move, so a viewer never sees half of it."""
    _save(core_metrics_figure(history, title=title, baselines=baselines), Path(path))


def draw_expert_dashboard(
    history: Records, path: str | Path, *, alarms: Sequence[str] = (), title: str = "Experts"
) -> None:
    """Save `expert_dashboard_figure` as a PNG; the file is replaced in one move."""
    _save(expert_dashboard_figure(history, alarms=alarms, title=title), Path(path))


def core_metrics_figure(
    history: Records, *, title: str = "Core metrics", baselines: Mapping[str, float] | None = None
) -> Figure:
    """Losses, accuracies, predictive integrity, surprise, tau, experts per token and load, over steps.

    Args:
        history: records, oldest first; with `held_out_nats` and `held_out_bits_per_byte` where an evaluation was made.
        baselines: name -> nats per token, drawn as horizontal lines beside the main loss.
    """
    figure = Figure(figsize=(WIDTH, 13.0), dpi=DPI)
    top = _header(figure, title, history)
    grid = figure.add_gridspec(3, 2, left=0.06, right=0.94, bottom=0.05, top=top - 0.05, hspace=0.42, wspace=0.28)
    loss, accuracy, integrity, surprise, tau, routing = (figure.add_subplot(grid[i]) for i in range(6))
    at = columns(history, COLUMNS)
    _losses(loss, history, at, baselines or {})
    panel(accuracy, at, "Accuracy", "share of tokens")
    curve(accuracy, history, at, "main_acc", BLUE, "next token (main_acc)")
    curve(accuracy, history, at, "gating_acc", ORANGE, "gating_acc")
    curve(accuracy, history, at, "gating_trivial", GREY, "its trivial value", ls="--")
    accuracy.set_ylim(-0.02, 1.02)
    panel(integrity, at, "Predictive integrity", "PI score")
    curve(integrity, history, at, "pi_score", GREEN, "exp(-alpha (main loss / tau + gamma surprise))")
    panel(surprise, at, "Surprise", "gradient norm of w2, nats")
    curve(surprise, history, at, "surprise", PURPLE, "mean over routed (layer, token, expert)")
    plots.log_if_wide(surprise, gather(numbers(history, "surprise"), at.starts))
    panel(tau, at, "Entropy of the output distribution", "tau, nats")
    curve(tau, history, at, "tau", BLUE, "tau")
    for ax in (accuracy, integrity, surprise, tau):
        legend(ax)
    _routing(routing, history, at)
    return figure


def expert_dashboard_figure(history: Records, *, alarms: Sequence[str] = (), title: str = "Experts") -> Figure:
    """Selected and minimum-surprise experts over steps; current load and surprise per layer and expert.

    Alarms stand in a red banner, for which the picture grows.
    """
    figure = Figure(figsize=(WIDTH, 10.0), dpi=DPI)
    top = _header(figure, title, history, alarms)
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        2, 2, left=0.075, right=0.925, bottom=0.95 / height, top=top - 0.42 / height, hspace=0.28, wspace=0.38
    )
    selected, targets, load, surprise = (figure.add_subplot(grid[i]) for i in range(4))
    at = columns(history, COLUMNS)
    shape = table_shape(history, ("expert_load", "target_load", "expert_surprise")) or (1, 1)
    for ax, key, name, unit in (
        (selected, "expert_load", "Selected experts", "share of rows"),
        (targets, "target_load", "Minimum-surprise experts (the router's targets)", "share of targets"),
    ):
        plots.heading(ax, name)
        plots.load_over_steps(ax, column_tables(history, key, shape, at.starts, NUMBERS_READ), at, unit)

    window = history[-WINDOW:]
    span = f"mean of the last {len(window)} records" if len(window) > 1 else "last record"
    share = _mean(tables(window, "expert_load", shape)) * shape[1]
    plots.heading(load, f"Load per layer, {span}")
    plots.heat_map(load, plots.octaves(share), *plots.load_scale(), share)
    plots.load_bar(load, "share of rows")
    norms = tables(window, "expert_surprise", shape)
    unused = (norms == 0).any(axis=0)
    norms = _mean(np.where(norms > 0, norms, np.nan))  # the batches in which the expert got rows
    plots.heading(surprise, f"Surprise per layer, {span}")
    plots.surprise_map(surprise, np.where(np.isnan(norms) & unused, 0.0, norms))
    figure.text(0.075, 0.22 / height, FOOTNOTE, fontsize=9, color=GREY, parse_math=False)
    return figure


def _losses(ax: Axes, history: Records, at: Columns, baselines: Mapping[str, float]) -> None:
    panel(ax, at, "Losses", "main loss, nats per token")
    curve(ax, history, at, "main_loss", BLUE, "main loss")
    held_out, bits = numbers(history, "held_out_nats"), numbers(history, "held_out_bits_per_byte")
    known = np.flatnonzero(np.isfinite(held_out))
    if len(known):
        column = np.searchsorted(at.starts, known, side="right") - 1
        last = f"held out, last {held_out[known[-1]]:.3f}"
        last += f" ({bits[known[-1]]:.3f} bits per byte)" if np.isfinite(bits[known[-1]]) else ""
        ax.plot(at.x[column], held_out[known], color=GREEN, marker="o", ms=4, lw=1.0, label=last)
    right = twin(ax, "router loss, nats per informative token", ORANGE)
    curve(right, history, at, "router_loss", ORANGE, "router loss (right)")
    for value in baselines.values():
        ax.axhline(value, color=GREY, lw=0.8, ls=":")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.05 * (high - low), high)
    losses = numbers(history, "main_loss")
    last = losses[np.isfinite(losses)][-1:]
    for place, (name, value) in enumerate(baselines.items()):
        beside = (abs(last - value) < 0.12 * (high - low)).any()
        x = (0.62 if beside else 0.99) - 0.18 * (place % 3)  # side by side: compressors are close to each other
        ax.text(  # below its line, for curves come from above; where they end beside it, further to the left
            x, value, printable(f"{name} {value:.2f}"), transform=ax.get_yaxis_transform(), fontsize=8.5, color=GREY,
            ha="right", va="top", parse_math=False,
        )  # fmt: skip
    legend(ax, right)


def _routing(ax: Axes, history: Records, at: Columns) -> None:
    shape = table_shape(history, ("expert_load",))
    layers, per = (shape[0], "per layer") if shape else (1, "in all layers")
    panel(ax, at, "Experts per token and load", "experts")
    curve(ax, history, at, "avg_k", BLUE, "per token (avg_k)")
    curve(ax, history, at, "dead_experts", GREY, f"dead {per}", scale=1 / layers, ls="--")
    ax.set_ylim(bottom=-0.03 * ax.get_ylim()[1])  # a curve at zero stays visible
    right = twin(ax, "max_vio: (max - mean) / mean load", ORANGE)
    curve(right, history, at, "max_vio", ORANGE, "max_vio (right)")
    right.set_ylim(bottom=-0.03 * right.get_ylim()[1])
    legend(ax, right)


def _header(figure: Figure, title: str, history: Records, alarms: Sequence[str] | None = None) -> float:
    """Title, progress, and the alarms, for which the figure grows; returns where it ends, as a share of the height."""
    inches, size = WIDTH - 2 * MARGIN, 10.5
    banner = "\n".join(plots.wrap_to(figure, alarm, inches - 0.4, fontsize=size) for alarm in alarms or ())
    title = plots.wrap_to(figure, title, inches - 5.0, fontsize=14, fontweight="bold")
    title_inches = 0.27 * (title.count("\n") + 1)
    banner_inches = 0.2 * (banner.count("\n") + 1) + 0.2 if banner else 0.0
    height = figure.get_figheight() + banner_inches + title_inches - 0.27
    figure.set_figheight(height)
    left, right, under_title = MARGIN / WIDTH, 1 - MARGIN / WIDTH, 1 - (MARGIN + title_inches) / height
    figure.text(left, 1 - MARGIN / height, title, fontsize=14, fontweight="bold", va="top", parse_math=False)
    note = _progress(history) + (f"  |  {NO_ALARM}" if alarms is not None and not banner else "")
    figure.text(right, 1 - MARGIN / height, note, fontsize=10, color=GREY, ha="right", va="top")
    if not banner:
        return under_title
    end = under_title - (banner_inches + 0.08) / height
    box = Rectangle((left, end), right - left, banner_inches / height, color=ALARM, transform=figure.transFigure)
    figure.add_artist(box)
    figure.text(
        left + 0.2 / WIDTH, end + banner_inches / height / 2, banner, fontsize=size, color="white", va="center",
        linespacing=1.25, parse_math=False,
    )  # fmt: skip
    return end


def _progress(history: Records) -> str:
    if not history:
        return "no record yet"
    parts = []
    for key, text in (("step", "step {:,.0f}"), ("tokens", "{:,.0f} tokens"), ("seconds", "{:,.0f} s")):
        known = numbers(history[-1:], key)
        parts += [text.format(known[0])] if np.isfinite(known[0]) else []
    return ", ".join(parts)


def _mean(table: np.ndarray) -> np.ndarray:
    """Mean of the known entries over the first axis, NaN where there are none."""
    return gather(table, np.zeros(1, dtype=np.int64))[0] if len(table) else np.full(table.shape[1:], np.nan)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = BytesIO()
    with plots.quiet_glyphs():
        figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())
