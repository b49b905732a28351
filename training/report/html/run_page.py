"""The page of a single run: its score beside the baselines, alarms, curves, loads, a sample, its configuration."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.report.digest import Digest, mean_curves
from training.report.html import heat_maps
from training.report.html.arms import Arm, frames_of, layer_charts
from training.report.html.charts import Chart, Line, curve_chart
from training.report.html.page import Cell, Page, render
from training.report.html.wording import number
from training.report.series import LARGEST

POINTS = 500  # most of a curve
TRIVIAL = "gating_trivial"
# (title, unit, ((key, name), ...)); colours by place
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "nats per token", (("main_loss", "training"), ("held_out_nats", "held out"))),
    (
        "Accuracy",
        "share of tokens",
        (("main_acc", "next token"), ("gating_acc", "gating"), (TRIVIAL, "trivial gating")),
    ),
    ("Router loss", "nats per informative token", (("router_loss", "router loss"),)),
    ("Experts per token", "avg K", (("avg_k", "avg K"),)),
    ("Load imbalance, MaxVio", "(max \u2212 mean) / mean load", (("max_vio", "MaxVio"),)),
    ("Dead experts", "(layer, expert) pairs without a row in the batch", (("dead_experts", "dead experts"),)),
    ("Surprise", "mean gradient norm of w2, nats", (("surprise", "surprise"),)),
    ("Predictive integrity and entropy", "PI score; tau in nats", (("pi_score", "PI score"), ("tau", "tau"))),
)
MAPS = (("Rows", "expert_load"), ("Targets of the router", "target_load"), ("Surprise", "expert_surprise"))


class RunFiles(NamedTuple):
    """Contents of a run's folder that its page shows."""

    folder: str  # as the reader names it
    text: str  # of config.yaml
    values: Mapping[str, Any]  # of config.yaml
    summary: Mapping[str, Any]  # {} while the run is under way
    digest: Digest  # of its records
    commands: str  # that make the run again


def run_page(run: RunFiles) -> Page:
    """The page of one run."""
    name, digest = Path(run.folder).resolve().name, run.digest
    curves = mean_curves([digest], POINTS)
    arm = Arm("", "this run", 1, [digest], curves, digest if digest.window.size else None)
    nats = {name: bits * math.log(2) for name, bits in _baselines(run.summary).items()}
    scale, frames = heat_maps.surprise_scale([digest]), frames_of([arm], len(MAPS))
    return render(
        f"{name}: run", "run.html", name=name, answer=_answer(run), alarms=run.summary.get("alarms") or (),
        known=_facts(run), ranking=_ranking(run.summary),
        curves=[_chart(arm, title, unit, lines, nats if title == "Loss" else {}) for title, unit, lines in CHARTS],
        layers=layer_charts([arm]),
        maps=[heat_maps.expert_map(title, arm.shown, key, frames, scale) for title, key in MAPS],
        load_legend=heat_maps.load_legend(), surprise_legend=heat_maps.surprise_legend(scale),
        sample=str(run.summary.get("sample") or ""), commands=run.commands, text=run.text,
    )  # fmt: skip


def _answer(run: RunFiles) -> str:
    summary = run.summary
    nats, bits = summary.get("nats_per_token"), summary.get("bits_per_byte")
    if nats is not None:
        answer = f"{number(bits)} bits per byte, {number(nats)} nats per token on "
        return answer + f"{number(summary.get('held_out_bytes'), ',')} held-out bytes."
    if summary:
        return f"Diverged at step {summary.get('steps', '?')}: there is no score."
    return f"Not done: step {run.digest.last.get('step', 0)} of {run.values.get('steps', '?')}; there is no score yet."


def _facts(run: RunFiles) -> list[tuple[str, object]]:
    summary, last = run.summary, run.digest.last
    return [
        ("data", run.values.get("data", "?")), ("seed", run.values.get("seed", "?")),
        ("steps", f"{summary.get('steps', last.get('step', 0)):,} of {run.values.get('steps', '?')}"),
        ("tokens", f"{summary.get('tokens', last.get('tokens', 0)):,}"),
        ("parameters", number(summary.get("parameters"), ",.0f")),
        ("active parameters", number(summary.get("active_parameters"), ",.0f")),
        ("avg K", number(summary.get("avg_k", last.get("avg_k")), ".2f")),
        ("training time", f"{number(summary.get('train_seconds', last.get('seconds')), ',.1f')} s"),
        ("tokens per second", number(summary.get("tokens_per_second"), ",.0f")),
    ]  # fmt: skip


def _ranking(summary: Mapping[str, Any]) -> list[list[str | Cell]]:
    """The model among the baselines, best first."""
    bits = _baselines(summary)
    if not bits or summary.get("bits_per_byte") is None:
        return []
    ranked = sorted(({"this model": summary["bits_per_byte"]} | bits).items(), key=lambda pair: pair[1])
    return [[Cell(n, slot=1 if n == "this model" else None), number(b), number(b * math.log(2))] for n, b in ranked]


def _baselines(summary: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte of the baselines that have a number, and one that can be drawn."""
    baselines = summary.get("baselines") or {}
    return {name: value for name, value in baselines.items() if isinstance(value, int | float) and abs(value) < LARGEST}


def _chart(run: Arm, title: str, unit: str, keys: Sequence[tuple[str, str]], levels: Mapping[str, float]) -> Chart:
    """One chart of a run; colours by place, a trivial value is grey."""
    slots = [0 if key == TRIVIAL else place for place, (key, _) in enumerate(keys, 1)]
    lines = [Line(name, name, slot, run.curves[key]) for slot, (key, name) in zip(slots, keys, strict=True)]
    chart = curve_chart(title, unit, lines, levels=levels)
    legend = [(line.arm, line.name, line.slot, "") for line in lines] if chart.spec and len(lines) > 1 else []
    return chart._replace(legend=legend)
