"""The page of a single run: its score beside the baselines, alarms, curves, loads, a sample, its configuration."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.report.html import elements as h
from training.report.html.charts import Curve, legend, line_chart
from training.report.html.elements import Html, element, join, number
from training.report.html.heat_maps import last_tables, load_legend, load_map, surprise_map
from training.report.series import LARGEST, Records, columns, gather, numbers

POINTS = 500  # most of a curve
TRIVIAL, WROTE = "gating_trivial", "versions of what wrote this page"
# (title, unit, ((key, name in the legend or "" for none), ...)); colours by place
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "nats per token", (("main_loss", "training"), ("held_out_nats", "held out"))),
    (
        "Accuracy",
        "share of tokens",
        (("main_acc", "next token"), ("gating_acc", "gating"), (TRIVIAL, "trivial gating")),
    ),
    ("Router loss", "nats per informative token", (("router_loss", ""),)),
    ("Experts per token", "avg K", (("avg_k", ""),)),
    ("Load imbalance, MaxVio", "(max − mean) / mean load", (("max_vio", ""),)),  # noqa: RUF001
    ("Dead experts", "(layer, expert) pairs without a row in the batch", (("dead_experts", ""),)),
    ("Surprise", "mean gradient norm of w2, nats", (("surprise", ""),)),
    ("Predictive integrity and entropy", "PI score; tau in nats", (("pi_score", "PI score"), ("tau", "tau"))),
)


class RunFiles(NamedTuple):
    """Contents of a run's folder that its page shows."""

    folder: str  # as the reader names it
    text: str  # of config.yaml
    values: Mapping[str, Any]  # of config.yaml
    summary: Mapping[str, Any]  # {} while the run is under way
    history: Records
    commands: str  # that make the run again


def run_page(run: RunFiles) -> str:
    """The page of one run."""
    name = Path(run.folder).resolve().name
    return h.page(
        f"{name}: run",
        _opening(run, name),
        h.section("Curves", _charts(run)),
        _maps(run.history),
        _sample(run.summary.get("sample")),
        _reproduction(run),
    )


def _opening(run: RunFiles, name: str) -> Html:
    summary, history = run.summary, run.history
    steps, last = run.values.get("steps", "?"), history[-1] if history else {}
    nats, bits = summary.get("nats_per_token"), summary.get("bits_per_byte")
    if nats is not None:
        answer = f"{number(bits)} bits per byte, {number(nats)} nats per token on "
        answer += f"{number(summary.get('held_out_bytes'), ',')} held-out bytes."
    elif summary:
        answer = f"Diverged at step {summary.get('steps', '?')}: there is no score."
    else:
        answer = f"Not done: step {last.get('step', 0)} of {steps}; there is no score yet."
    shown = [
        ("data", run.values.get("data", "?")), ("seed", run.values.get("seed", "?")),
        ("steps", f"{summary.get('steps', last.get('step', 0)):,} of {steps}"),
        ("tokens", f"{summary.get('tokens', last.get('tokens', 0)):,}"),
        ("parameters", number(summary.get("parameters"), ",.0f")),
        ("active parameters", number(summary.get("active_parameters"), ",.0f")),
        ("avg K", number(summary.get("avg_k", last.get("avg_k")), ".2f")),
        ("training time", f"{number(summary.get('train_seconds', last.get('seconds')), ',.1f')} s"),
        ("tokens per second", number(summary.get("tokens_per_second"), ",.0f")),
    ]  # fmt: skip
    return join((
        h.paragraph("Tiny-ONN run", class_="kind"), element("h1", name), h.paragraph(answer, class_="answer"),
        *(h.warning(element("strong", "Alarm. "), alarm) for alarm in summary.get("alarms") or ()),
        h.facts(shown), _ranking(summary),
    ))  # fmt: skip


def _ranking(summary: Mapping[str, Any]) -> Html:
    """The model among the baselines, best first."""
    bits = _baselines(summary)
    if not bits or summary.get("bits_per_byte") is None:
        return Html("")
    ranked = sorted(({"this model": summary["bits_per_byte"]} | bits).items(), key=lambda pair: pair[1])
    rows = [[element("strong", n) if n == "this model" else n, number(b), number(b * math.log(2))] for n, b in ranked]
    return h.section(
        "Beside simple baselines", h.table("Score beside baselines", ["", "bits per byte", "nats per byte"], rows)
    )


def _baselines(summary: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte of the baselines that have a number, and one that can be drawn."""
    baselines = summary.get("baselines") or {}
    return {name: value for name, value in baselines.items() if isinstance(value, int | float) and abs(value) < LARGEST}


def _charts(run: RunFiles) -> Html:
    nats = {name: bits * math.log(2) for name, bits in _baselines(run.summary).items()}
    charts = []
    for title, unit, lines in CHARTS:
        curves = [_curve(run.history, key, name or title, slot) for slot, (key, name) in _slotted(lines)]
        named = [(name, slot) for slot, (_, name) in _slotted(lines) if name]
        chart = line_chart(title, unit, curves, levels=nats if title == "Loss" else None)
        charts.append(element("div", chart, legend(named) if named else ""))
    return element("div", *charts, class_="charts")


def _slotted(lines: Sequence[tuple[str, str]]) -> list[tuple[int, tuple[str, str]]]:
    """Colours by place; a trivial value is grey."""
    return [(0 if line[0] == TRIVIAL else place, line) for place, line in enumerate(lines, 1)]


def _curve(history: Records, key: str, name: str, slot: int) -> Curve:
    records = [record for record in history if isinstance(record.get(key), int | float)]
    at = columns(records, POINTS)
    return Curve(name, at.x, gather(numbers(records, key), at.starts), slot)


def _maps(history: Records) -> Html:
    maps = (
        load_map("Rows", last_tables(history, "expert_load")),
        load_map("Targets of the router", last_tables(history, "target_load")),
        surprise_map("Surprise, nats", last_tables(history, "expert_surprise")),
    )
    note = "Layers downwards, experts to the right; means of the last records. Rows and targets in fair shares:"
    return h.section(
        "Experts at the end", h.paragraph(note, class_="note"), load_legend(), element("div", *maps, class_="maps")
    )


def _sample(sample: object) -> Html:
    if not sample:
        return Html("")
    return h.section("Sample", element("div", h.listing("Sample text", str(sample)), class_="sample"))


def _reproduction(run: RunFiles) -> Html:
    command = h.listing("Commands", run.commands)
    bent = h.warning(
        "The run went on with another number of steps than it began with, so the learning rates follow one schedule "
        "after the other: its score is not that of a run of so many steps."
    )
    known = join((command, bent if "--resume" in run.commands else "", h.facts([(WROTE, h.versions())])))
    file = (h.paragraph("config.yaml", class_="note"), h.listing("config.yaml", run.text))
    return join((h.section("How to reproduce", known), h.section("Configuration", *file)))
