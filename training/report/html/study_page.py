"""The page of a study: answer, plan, every arm beside its baseline, every run, commands."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tiny_onn_func.tree import flatten
from training.report.html import heat_maps
from training.report.html.arms import Arm, frames_of, layer_charts, line_of
from training.report.html.charts import Chart, Difference, curve_chart, forest
from training.report.html.page import Cell, Page, render
from training.report.html.study_arms import (
    DigestOf,
    Group,
    Study,
    SummaryOf,
    alarm_lines,
    read_groups,
    scores_by_seed,
    tuned_values,
)  # fmt: skip
from training.report.html.study_routing import routing_values
from training.report.html.study_runs import run_charts
from training.report.html.study_tasks import tasks_values
from training.report.html.study_tokens import AtlasOf, token_values
from training.report.html.study_tuning import tuning_charts
from training.report.html.wording import NOTHING, bounds, level_note, number, speedup_bounds, speedup_text
from training.storage.results import DIVERGED, FINISHED, MEASURES, UNFINISHED, Row

SPEEDUP = "effective speed-up"
HEAD = (
    "arm", "verdict", "nats per token", "difference to baseline", SPEEDUP, "avg K", "MaxVio",
    "dead experts", "gating accuracy", "active FLOPs of a token", "bits per byte", "p of no difference",
    "p of no equivalence",
)  # fmt: skip
CHARTS = (
    ("Training loss", "nats per token", "main_loss"),
    ("Held-out loss", "nats per token", "held_out_nats"),
    ("Load imbalance, MaxVio", "(max \u2212 mean) / mean load", "max_vio"),
    ("Experts per token", "avg K", "avg_k"),
    ("Routing drift", "share of first choices that changed since the evaluation before", "routing_drift"),
)


def study_page(study: Study, digest_of: DigestOf, summary_of: SummaryOf, atlas_of: AtlasOf = lambda run: ()) -> Page:
    """Build the page of a study.

    `digest_of`, `summary_of` and `atlas_of` give a run's records, summary and token atlas, empty ones where there are
    none.
    """
    summary_of = cache(summary_of)
    groups, analysis = read_groups(study, digest_of, summary_of), study.analysis
    arms = [arm for group in groups for arm in group.arms]
    best = [arm for group in groups for arm in group.best_first()]
    name = str(analysis.get("name") or "study")
    scale = heat_maps.surprise_scale([arm.shown for arm in arms if arm.shown is not None])
    frames = frames_of(arms, 2)
    head, results = _results(groups)
    return render(
        f"{name}: study", "study.html", name=name, analysis=analysis, margin=f"{analysis['margin']:g}",
        within=f"{analysis.get('matched_within', 0.05):.0%}",  # what was used before analysis.json recorded it
        known=_facts(study), warnings=_warnings(study), changed=_changed(study),
        head=head, results=results, tuning=_tuning(analysis), differences=_differences(study, groups),
        tasks=tasks_values(study, best, summary_of), base=study.values.get("base") or {},
        rates=[(g.baseline, _legend(g.arms), of) for g in groups if (of := _rates(study, g.arms))],
        runs=[(g.baseline, _legend(g.arms), of) for g in groups if (of := run_charts(g.arms, study.rows))],
        curves=[(group.baseline, _legend(group.arms), _curves(study, group.arms)) for group in groups],
        layers=[(g.baseline, _legend(g.arms), charts) for g in groups if (charts := layer_charts(g.arms))],
        loads=[_map(arm, "expert_load", frames, scale) for arm in arms], alarms=alarm_lines(arms),
        surprises=[_map(arm, "expert_surprise", frames, scale) for arm in arms],
        load_legend=heat_maps.load_legend(), surprise_legend=heat_maps.surprise_legend(scale),
        routing=routing_values(best), tokens=token_values(best, atlas_of),
        settings=_settings(study.values), every=_every_run(study.rows),
        folder=study.folder, commands=_commands(study.folder), text=study.text,
    )  # fmt: skip


def _facts(study: Study) -> list[tuple[str, object]]:
    """Number of runs, arms, seeds and steps behind the answer."""
    states, rows, analysis = Counter(row["status"] for row in study.rows), study.rows, study.analysis
    base_steps = (study.values.get("base") or {}).get("steps", NOTHING)
    steps = {str(row.get("steps", base_steps)) for row in rows}
    counts = ", ".join(f"{states[state]} {state}" for state in (FINISHED, DIVERGED, UNFINISHED) if states[state])
    return [
        ("runs", f"{len(rows)} ({counts})"), ("arms", len(analysis["arms"])), ("seeds", _seeds(study)),
        ("steps of a run", ", ".join(sorted(steps))), ("compared with", analysis["baseline"]),
        ("compared by", "held-out nats per token"),
    ]  # fmt: skip


def _seeds(study: Study) -> int:
    """Seeds that are compared."""
    return len({row["seed"] for row in study.rows} - {str(seed) for seed in study.analysis.get("tuned_on", ())})


def _warnings(study: Study) -> list[str]:
    states, total, seeds = Counter(row["status"] for row in study.rows), len(study.rows), _seeds(study)
    same = [label for label, pair in study.analysis["against_baseline"].items() if pair.get("identical")]
    notes = {
        f"Not done: {states[UNFINISHED]} of {total} runs are unfinished. This is a look in between.": states[
            UNFINISHED
        ],
        f"{states[DIVERGED]} of {total} runs diverged. An arm with such a run is never called better, worse or "
        "equivalent, and its mean is of the runs that are left.": states[DIVERGED],
        f"Every score of {', '.join(same)} is its baseline's to the last digit: what it changes had no effect.": same,
        "One seed: no intervals, no verdicts. Five seeds or more can decide something.": seeds == 1,
        "Two seeds: intervals are very wide. Five seeds or more can decide something.": seeds == 2,
    }
    return [*(note for note, holds in notes.items() if holds), *study.analysis.get("warnings", ())]


def _changed(study: Study) -> str:
    """Keys of study.yaml that were changed since the results were judged."""
    analysis, values = study.analysis, study.values
    return ", ".join(k for k in ("margin", "falsifier", "question") if k in values and values[k] != analysis[k])


# Arms -----------------------------------------------------------------------------------------------------------------


def _results(groups: Sequence[Group]) -> tuple[list[str], list[list[str | Cell]]]:
    """Head and rows of the arms, the best first; the speed-up has a column where some arm has one."""
    rows: list[list[str | Cell]] = []
    for group in groups:
        rows += [[f"compared with {group.baseline}"]] if len(groups) > 1 else []
        rows += [_result(arm) for arm in group.best_first()]
    if any((arm.pair or {}).get("effective_speedup") for group in groups for arm in group.arms):
        return [*HEAD], rows
    column = HEAD.index(SPEEDUP)
    return [name for name in HEAD if name != SPEEDUP], [row[:column] + row[column + 1 :] for row in rows]


def _result(arm: Arm) -> list[str | Cell]:
    """The cells of one arm."""
    result, pair = arm.result, arm.pair or {}
    seeds = f"{result['n']} {'seed' if result['n'] == 1 else 'seeds'}"
    if result.get("seeds", result["n"]) != result["n"]:  # in a stream, a pair is of a seed and an order
        seeds = f"{result['n']} runs of {result['seeds']} seeds"
    seeds += f", {result['diverged']} diverged" if result["diverged"] else ""
    verdict = str(pair.get("verdict", "baseline"))
    beyond = "beyond the margin" if pair.get("beyond_margin") and verdict in ("better", "worse") else ""
    speedup, _, beyond_curve = speedup_text(pair.get("effective_speedup")).partition(", ")
    k, flops = (_matched(pair.get(key)) for key in ("k_matched", "flops_matched"))
    return [
        Cell(arm.short, (tuned_values(arm), seeds), slot=arm.slot),
        Cell(verdict, (beyond,), badge=True),
        Cell(number(result["mean"]), (bounds(result["low"], result["high"]),)),
        Cell(number(pair.get("difference"), "+.4f"), (_interval(pair),)),
        Cell(speedup or NOTHING, (beyond_curve, speedup_bounds(pair.get("effective_speedup")))),
        Cell(number(result["avg_k"], ".2f"), (k,)),
        number(result["max_vio"], ".2f"),
        number(result["dead_experts"], ".1f"),
        Cell(number(result["gating_acc"], ".3f"), (f"trivial {number(result['gating_trivial'], '.3f')}",)),
        Cell(
            number(result.get("flops_per_token"), ",.0f"),
            (f"{number(result['active_parameters'], ',.0f')} weights", flops),
        ),
        number(result["bits_per_byte"]),
        number(pair.get("p_holm"), ".3g"),
        number(pair.get("tost_p_holm"), ".3g"),
    ]


def _interval(pair: Mapping[str, Any]) -> str:
    """The interval of a difference; of several orders of tasks, the one for other orders and the one for these."""
    interval = bounds(pair.get("low"), pair.get("high"), "+.4f") + level_note(pair)
    if pair.get("orders", 1) == 1 or not interval:
        return interval
    return f"{interval}; in these orders {bounds(pair.get('same_orders_low'), pair.get('same_orders_high'), '+.4f')}"


def _matched(matched: bool | None) -> str:
    return "" if matched is None else "matched" if matched else "not matched"


def _tuning(analysis: Mapping[str, Any]) -> str:
    """Note on the runs that chose the values of the tuned axes, and on the bias that follows."""
    if not analysis.get("tuned"):
        return ""
    if note := analysis.get("note"):
        return str(note)
    shown = f"Every arm is shown at its best value of {', '.join(analysis['tuned'])}, chosen by"
    if seeds := analysis.get("tuned_on"):
        return f"{shown} runs of seeds {', '.join(map(str, seeds))}, which are not compared."
    return (  # an analysis.json that was made before it had a note
        f"{shown} the same held-out scores, which flatters all of them, and nothing here is corrected for it; remove "
        "analysis.json, and the report makes it anew."
    )


# Figures --------------------------------------------------------------------------------------------------------------


def _differences(study: Study, groups: Sequence[Group]) -> list[Chart]:
    """A forest plot for every baseline."""
    charts = []
    for group in groups:
        theirs = next((scores_by_seed(study, arm) for arm in group.arms if arm.label == group.baseline), {})
        rows = []
        for arm in group.best_first():
            ours = scores_by_seed(study, arm)
            each = [score - theirs[seed] for seed, score in ours.items() if seed in theirs]
            rows += [] if arm.pair is None else [Difference(arm.label, arm.short, arm.slot, arm.pair, each)]
        charts += [forest(group.baseline, rows, study.analysis["margin"])] if rows else []
    return charts


def _rates(study: Study, arms: Sequence[Arm]) -> list[Chart]:
    return tuning_charts(study.analysis.get("tuned") or (), sorted(arms, key=lambda arm: arm.slot))


def _legend(arms: Sequence[Arm]) -> list[tuple[str, str, int, str]]:
    return [(arm.label, arm.short, arm.slot, arm.lost) for arm in sorted(arms, key=lambda arm: arm.slot)]


def _curves(study: Study, arms: Sequence[Arm]) -> list[Chart]:
    drawn, base = sorted(arms, key=lambda arm: arm.slot), study.values.get("base") or {}
    begun = any(arm.curves["main_loss"].y.size for arm in drawn)
    return [
        curve_chart(title, unit, [line_of(arm, key) for arm in drawn], empty=_why_empty(key, base, begun))
        for title, unit, key in CHARTS
    ]


def _why_empty(key: str, base: Mapping[str, Any], begun: bool) -> str:
    """Why a chart has no line; `begun` says whether there are records at all."""
    if key == "held_out_nats" and begun:
        every = base.get("eval_every") or 0
        wanted = f"eval_every: {every}, " + (f"steps: {base.get('steps')}" if every else "which asks for none")
        return f"No score was made during the runs ({wanted}). The final ones are in the table."
    if key == "routing_drift":
        return "Drift was not measured: it wants eval_every and analysis_tokens."
    return "No record yet."


def _map(arm: Arm, key: str, frames: int, scale: heat_maps.Scale) -> Chart:
    of = {"unit": arm.shown_run, "arm": arm.label, "slot": arm.slot}
    return heat_maps.expert_map(arm.label, arm.shown, key, frames, scale, **of)


# Settings and runs ----------------------------------------------------------------------------------------------------


def _settings(values: Mapping[str, Any]) -> list[list[str]]:
    """Settings of each arm, and the axes that every arm takes."""
    rows = []
    for arm in values.get("arms") or ():
        changes = ", ".join(f"{key} = {value}" for key, value in flatten(arm.get("set") or {}).items())
        rows.append([arm.get("name"), changes or "nothing: the base as it is"])
    axes = (values.get("axes") or {}).items()
    return rows + [[f"every arm at {key}", ", ".join(map(str, points))] for key, points in axes]


def _every_run(rows: Sequence[Row]) -> tuple[list[str], list[list[str | Cell]]]:
    """results.csv: the arm, the seed and the scores first, the settings behind them."""
    keys = [key for key in rows[0] if key not in ("run", "status", "arm", "seed")]
    keys.sort(key=lambda key: key not in MEASURES)
    head = ["run", "status", "arm", "seed", *keys]
    return head, [[row["run"], Cell(row["status"], badge=True), *(row[k] or NOTHING for k in head[2:])] for row in rows]


def _commands(folder: str) -> str:
    again, described = (shlex.quote(path) for path in (f"{folder.rstrip('/')}-again", str(Path(folder) / "study.yaml")))
    return f"tiny-onn study {described} --out {again}\ntiny-onn report {again}"
