"""Pictures of a run: `core_metrics` (3 x 2 curves) and the `expert_dashboard` (2 x 2 maps), drawn from its records.

Figures are made by `*_figure` functions and saved by `draw_*`. No pyplot, so nothing is global; records may lack keys
or hold None (nothing is drawn there), and any number of them is drawn in at most COLUMNS columns.
"""

import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, Any]]

COLUMNS = 800  # most points of a curve, most columns of a map
WINDOW = 20  # records behind the heat maps
DPI, WIDTH = 100, 14.0  # inches: pictures are 1400 pixels wide
NUMBERS_READ = 1_000_000  # most entries of a map that are read; beyond that records are sampled
# Okabe and Ito's palette: told apart by colour-blind readers
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#5f6368"
ALARM, NO_ROW, NO_DATA = "#b3261e", "#2b2b2b", "#e3e3e3"
FOOTNOTE = "Within one token the w2 ranking is argmin(weight * ||h||): it does not depend on the loss."


def draw_core_metrics(
    history: Records, path: str | Path, *, title: str = "", baselines: Mapping[str, float] | None = None
) -> None:
    """Save `core_metrics_figure` as a PNG; the file is replaced in one move, so a viewer never sees half of it."""
    _save(core_metrics_figure(history, title=title, baselines=baselines), Path(path))


def draw_expert_dashboard(history: Records, path: str | Path, *, alarms: Sequence[str] = (), title: str = "") -> None:
    """Save `expert_dashboard_figure` as a PNG; the file is replaced in one move."""
    _save(expert_dashboard_figure(history, alarms=alarms, title=title), Path(path))
