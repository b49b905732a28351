"""Curves and maps of arms: what the pages of a run and of a study show alike. A run is an arm of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from training.report.digest import Curve, Digest, layer_curves, surprise_shares
from training.report.html.charts import Chart, Line, curve_chart, surprise_histograms

POINTS, LAYER_POINTS = 250, 80  # most points of a curve, and of one of a layer
NUMBERS = 40_000  # most entries of all maps of a page, and of all its curves of layers
FRAMES = 24  # most tables of a map's slider
LAYER_CHARTS = (
    ("load entropy", "Load entropy", "share of log E"),
    ("MaxVio", "MaxVio", "(max \u2212 mean) / mean load"),
    ("dead experts", "Dead experts", "without a row in the batch"),
    ("co-activation", "Co-activation", "nats; 0 is chance"),
)


class Arm(NamedTuple):
    """One arm of a page."""

    label: str
    short: str  # the label without the point of the axes that its whole group has
    slot: int  # of colour and dashes: 0 for the baseline, then in the study's order
    digests: Sequence[Digest]  # of its runs
    curves: Mapping[str, Curve]  # means over its runs
    shown: Digest | None = None  # the first run with a table that did not diverge: experts of other seeds are strangers
    shown_run: str = ""
    result: Mapping[str, Any] = {}  # of analysis["arms"]
    pair: Mapping[str, Any] | None = None  # of analysis["against_baseline"]; None is a baseline
    together: Any = None  # cosines of co-activation of the shown run
    alarms: Sequence[Sequence[str]] = ()  # of each run
    lost: str = ""  # which runs diverged, and where

    @property
    def layers(self) -> int:
        """Layers of the shown run, 0 where no table is known."""
        return 0 if self.shown is None else self.shown.window.shape[2]


def line_of(arm: Arm, key: str, name: str = "") -> Line:
    """A curve of an arm."""
    return Line(arm.label, name or arm.short, arm.slot, arm.curves.get(key))


def layer_charts(arms: Sequence[Arm]) -> list[Chart]:
    """Load and company of the experts in every layer, a frame a layer; [] where no table is known."""
    drawn = [arm for arm in arms if arm.layers]
    if not drawn:
        return []
    points = max(12, min(LAYER_POINTS, NUMBERS // (len(drawn) * max(arm.layers for arm in drawn) * len(LAYER_CHARTS))))
    thin = [arm._replace(curves=layer_curves(arm.digests, points)) for arm in drawn]
    charts = [curve_chart(title, unit, [line_of(arm, key) for arm in thin]) for key, title, unit in LAYER_CHARTS]
    shares = surprise_shares([arm.digests for arm in drawn])
    lines = [Line(arm.label, arm.short, arm.slot, share) for arm, share in zip(drawn, shares, strict=True)]
    return [*(chart for chart in charts if chart.spec), surprise_histograms("Surprise of the experts' rows", lines)]


def frames_of(arms: Sequence[Arm], kinds: int) -> int:
    """Tables of each map, so that all maps of the page together are not too large."""
    entries = sum(arm.layers * arm.shown.window.shape[3] for arm in arms if arm.shown is not None) * kinds
    return max(1, min(FRAMES, NUMBERS // max(entries, 1)))
