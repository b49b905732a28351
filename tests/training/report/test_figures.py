"""Pictures show what the records hold, cut nothing, keep their size, and never fail on odd records."""

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from training.report import figures
from training.report.figures import (
    ALARM,
    FOOTNOTE,
    NO_ALARM,
    core_metrics_figure,
    draw_core_metrics,
    draw_expert_dashboard,
    expert_dashboard_figure,
)
from training.report.plots import OCTAVES, quiet_glyphs, wrap_to
from training.report.series import column_tables, columns, gather, smooth, table_shape

SCALARS = (
    "main_loss", "router_loss", "main_acc", "gating_acc", "gating_trivial", "pi_score", "surprise", "tau", "avg_k",
    "max_vio", "dead_experts",
)  # fmt: skip
TABLES = ("expert_load", "target_load", "expert_surprise")


def history(count: int, layers: int = 2, experts: int = 4) -> list[dict[str, Any]]:
    """Records in which expert 0 of layer 0 gets every row, layer 1 is even, and scalars differ by key and step."""
    load = np.full((layers, experts), 1 / experts)
    load[0] = np.eye(experts)[0]
    return [
        {
            "step": 10 * (i + 1), "tokens": 1000 * (i + 1), "seconds": 0.5 * i,
            **{key: (k + 1.0) / (i + 1) for k, key in enumerate(SCALARS)},
            "expert_load": load.tolist(), "target_load": load[:, ::-1].tolist(), "expert_surprise": load.tolist(),
        }
        for i in range(count)
    ]  # fmt: skip


def texts(figure: Figure) -> str:
    """All words of the figure's own texts, on one line."""
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


def is_alarmed(figure: Figure) -> bool:
    return any(isinstance(a, Rectangle) and a.get_facecolor() == to_rgba(ALARM) for a in figure.artists)


def assert_nothing_is_cut(figure: Figure) -> None:
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def core() -> Figure:
    records = history(5)
    records[2] |= {"held_out_nats": 1.25, "held_out_bits_per_byte": 1.803}
    return core_metrics_figure(records, title="A run", baselines={"gzip -9": 1.5})


@pytest.fixture(scope="module")
def dashboard() -> Figure:
    return expert_dashboard_figure(history(30), title="A run")


def test_core_metrics_has_six_named_panels_with_the_recorded_curves(core: Figure) -> None:
    panels, twins = core.axes[:6], core.axes[6:]
    assert all(ax.get_title(loc="left") and ax.get_xlabel() == "step" and ax.get_ylabel() for ax in panels)
    assert all(ax.get_ylabel() for ax in twins)
    shown = [
        ["main_loss"], ["main_acc", "gating_acc", "gating_trivial"], ["pi_score"], ["surprise"], ["tau"], ["avg_k"],
        ["router_loss"], ["max_vio"],
    ]  # fmt: skip
    for ax, keys in zip(core.axes, shown, strict=True):
        for line, key in zip(ax.lines, keys, strict=False):
            assert line.get_xdata().tolist() == [10, 20, 30, 40, 50]
            assert line.get_ydata().tolist() == [record[key] for record in history(5)]
    dead = panels[5].lines[1]
    assert dead.get_label() == "dead per layer"
    assert dead.get_ydata().tolist() == [record["dead_experts"] / 2 for record in history(5)]
    assert_nothing_is_cut(core)


def test_the_trivial_value_is_dashed_and_the_held_out_point_and_baseline_stand_where_they_belong(core: Figure) -> None:
    assert core.axes[1].lines[2].get_linestyle() == "--"
    held_out, baseline = core.axes[0].lines[1:3]
    assert (held_out.get_xdata().tolist(), held_out.get_ydata().tolist()) == ([30], [1.25])
    assert "1.250 (1.803 bits per byte)" in held_out.get_label()
    assert list(baseline.get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in core.axes[0].texts] == ["gzip -9 1.50"]


@pytest.mark.parametrize("ends", [1.5, 4.0])
def test_the_name_of_a_baseline_does_not_stand_where_the_loss_ends(ends: float) -> None:
    records = [record | {"main_loss": 5.0 - (5.0 - ends) * i / 99} for i, record in enumerate(history(100))]
    (name,) = core_metrics_figure(records, baselines={"gzip -9": 1.5}).axes[0].texts
    assert (name.get_position()[0] > 0.9) is (ends > 2)


def test_every_panel_has_a_legend(core: Figure) -> None:
    names = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in core.axes[:6]]
    assert [len(labels) for labels in names] == [3, 3, 1, 1, 1, 3]


def test_the_maps_show_shares_in_fair_shares_per_layer_and_expert(dashboard: Figure) -> None:
    selected, targets, load, surprise = dashboard.axes[:4]
    none, fair, most = -OCTAVES - 1, 0, 2  # log2 of fair shares; below the scale = no row
    rows = [most, none, none, none] + [fair] * 4
    for ax, wanted in ((selected, rows), (targets, [none, none, none, most] + [fair] * 4)):
        (image,) = ax.images
        assert np.asarray(image.get_array()).tolist() == [[value] * 30 for value in wanted]
        low, high = ax.get_ylim()
        assert low > high, "layer 0 belongs on top"
    for ax, wanted in ((load, [rows[:4], rows[4:]]), (surprise, [[1, 0.125, 0.125, 0.125], [0.25] * 4])):
        (image,) = ax.images
        pixels = np.asarray(image.get_array())
        assert pixels.shape == (2, 4)
        if ax is load:
            assert pixels.tolist() == wanted
        else:
            assert pixels[0, 0] == 1.0
            assert pixels[1].tolist() == [0.25] * 4
            assert (pixels[0, 1:] < image.norm.vmin).all(), "an expert without a row is black, not least surprised"
    assert [text.get_text() for text in load.texts] == ["4", "1", "1", "1", "1"]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in dashboard.axes[:4])
    assert_nothing_is_cut(dashboard)


def test_without_alarms_the_dashboard_says_so_and_carries_the_footnote(dashboard: Figure) -> None:
    assert NO_ALARM in texts(dashboard)
    assert FOOTNOTE in texts(dashboard)
    assert not is_alarmed(dashboard)


def test_alarms_stand_whole_in_a_red_banner_for_which_the_picture_grows(dashboard: Figure) -> None:
    alarms = ["first alarm " * 60, "W" * 300, "third: $x_{ 50 % \\frac"]
    alarmed = expert_dashboard_figure(history(30), alarms=alarms, title="A run " * 30)
    assert is_alarmed(alarmed)
    for alarm in alarms:
        assert alarm.replace(" ", "") in texts(alarmed).replace(" ", "")
    assert NO_ALARM not in texts(alarmed)
    assert FOOTNOTE in texts(alarmed)
    assert alarmed.get_figheight() > dashboard.get_figheight() + 1
    assert_nothing_is_cut(alarmed)
    banner = next(a for a in alarmed.artists if isinstance(a, Rectangle)).get_window_extent()
    words = next(t for t in alarmed.texts if t.get_text().startswith("first")).get_window_extent()
    assert banner.x0 < words.x0
    assert words.x1 < banner.x1
    assert banner.y0 < words.y0
    assert words.y1 < banner.y1


def test_wrapped_text_fits_and_loses_no_word() -> None:
    text = "some words, a-much-longer-word-than-fits-into-the-line and more"
    for inches in (0.5, 1.0, 3.0):
        figure = Figure(dpi=100)
        lines = wrap_to(figure, text, inches, fontsize=10)
        assert lines.replace("\n", "").replace(" ", "") == text.replace(" ", "")
        extent = figure.text(0, 0, lines, fontsize=10).get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert extent.width <= inches * 100


def test_pictures_are_1400_pixels_wide_and_leave_nothing_else_behind(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    draw_core_metrics(history(3), folder / "core.png", title="no such glyph: 漢", baselines={"a": 1.0})
    draw_expert_dashboard(history(3), folder / "experts.png", alarms=["alarm"], title="bad \ud800 \n\0")
    assert png_size(folder / "core.png")[0] == 1400
    assert png_size(folder / "experts.png")[0] == 1400
    assert sorted(os.listdir(folder)) == ["core.png", "experts.png"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "core.png"
    path.write_bytes(b"old")

    class Broken(Figure):
        def savefig(self, file: BytesIO, **_: object) -> None:
            file.write(b"half")
            raise OSError("no space left")

    monkeypatch.setattr(figures, "core_metrics_figure", lambda *_, **__: Broken())
    with pytest.raises(OSError, match="no space"):
        draw_core_metrics([], path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["core.png"]


def test_many_records_are_drawn_in_few_columns() -> None:
    records = [{"step": i, "main_loss": 1.0, "expert_load": [[0.5, 0.5]]} for i in range(2000)]
    figure = core_metrics_figure(records)
    assert max(len(line.get_xdata()) for ax in figure.axes for line in ax.lines) <= figures.COLUMNS
    at = columns(records, figures.COLUMNS)
    assert column_tables(records, "expert_load", (1, 2), at.starts, 1600).shape == (figures.COLUMNS, 1, 2)


# Odd records: holes everywhere, tables of any shape, numbers of any size.
odd_number = st.one_of(st.none(), st.floats(), st.integers(), st.just(10**400), st.text(max_size=2))
odd_table = st.one_of(
    st.none(), st.lists(st.none() | st.floats(0, 1), max_size=2),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.lists(st.none() | st.floats(), min_size=9, max_size=9)).map(
        lambda t: [[t[2][3 * i + j] for j in range(t[1])] for i in range(t[0])]
    ),
)  # fmt: skip
odd_record = st.fixed_dictionaries(
    {},
    optional={
        **{key: odd_number for key in ("step", "tokens", "seconds", "held_out_nats", *SCALARS)},
        **{key: odd_table for key in TABLES},
    },
)


EDGES = {
    "no record": [],
    "one record, one layer, one expert": history(1, 1, 1),
    "512 experts": history(3, 4, 512),
    "no tables, no losses": [{**r, **dict.fromkeys((*TABLES, "main_loss", "router_loss"))} for r in history(45)],
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_drawn_and_nothing_is_cut(name: str) -> None:
    for figure in (core_metrics_figure(EDGES[name], title=name), expert_dashboard_figure(EDGES[name])):
        FigureCanvasAgg(figure).draw()
        assert_nothing_is_cut(figure)


@settings(max_examples=settings().max_examples // 25, phases=(Phase.explicit, Phase.generate))  # seconds each
@given(st.lists(odd_record, min_size=1, max_size=6), st.lists(st.text(max_size=20), max_size=2), st.text(max_size=20))
def test_odd_records_never_raise(records: list[dict[str, Any]], alarms: list[str], title: str) -> None:
    for figure in (core_metrics_figure(records, title=title), expert_dashboard_figure(records, alarms=alarms)):
        with quiet_glyphs():
            FigureCanvasAgg(figure).draw()


@given(st.lists(odd_record, max_size=12), st.integers(1, 5))
def test_columns_part_the_records_and_hold_the_means_of_what_is_known(records: list[dict[str, Any]], most: int) -> None:
    at = columns(records, most)
    assert len(at.starts) == len(at.x) == min(len(records), most) == len(at.edges) - 1 or not records
    assert (np.diff(at.edges) > 0).all()
    assert (np.diff([*at.starts, len(records)]) >= 1).all()
    shape = table_shape(records, TABLES) or (1, 1)
    for values in (column_tables(records, "expert_load", shape, at.starts, 10**6), at.x):
        assert len(values) == len(at.starts)
    known = [r["step"] for r in records if isinstance(r.get("step"), int)]
    if at.name == "step" and records:
        assert known == [r.get("step") for r in records] or not all(isinstance(r["step"], int) for r in records)
        assert at.edges[0] < records[0]["step"] <= records[-1]["step"] < at.edges[-1]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(np.nan), min_size=1, max_size=12), st.data())
def test_gathered_columns_equal_a_loop(values: list[float], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(values)), max_size=4)) - {len(values)}
    starts = [0, *sorted(cuts)]
    means = gather(np.array(values), np.array(starts))
    for mean, first, behind in zip(means, starts, [*starts[1:], None], strict=True):
        known = [value for value in values[first:behind] if not np.isnan(value)]
        assert mean == pytest.approx(sum(known) / len(known)) if known else np.isnan(mean)


@given(st.integers(1, 300), st.floats(-5, 5), st.floats(-1, 1))
def test_smoothing_keeps_lines_where_it_is_centred_and_skips_holes(count: int, level: float, slope: float) -> None:
    line = level + slope * np.arange(count)
    smoothed = smooth(line)
    inner = slice(0, count - max(2, count // 80))
    np.testing.assert_allclose(smoothed[inner], line[inner], atol=1e-8)
    holes = np.where(np.arange(count) % 3 == 1, np.nan, level)
    np.testing.assert_allclose(smooth(holes), holes, atol=1e-8)
