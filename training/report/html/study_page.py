"""The page of a study: answer, plan, every arm beside its baseline, every run, commands."""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_onn_func.tree import flatten
from training.report.html import elements as h
from training.report.html.elements import Html, bounds, element, join, level_note, number, with_small
from training.report.html.study_arms import Group, ShownArm, Study, arm_name, read_groups
from training.report.html.study_charts import curves, differences, layers, loads
from training.report.html.study_routing import routing_part
from training.report.html.study_tasks import tasks_part
from training.report.series import Records
from training.storage.results import DIVERGED, FINISHED, MEASURES, UNFINISHED, Row

HEAD = (
    "arm", "verdict", "nats per token", "difference to baseline", "avg K", "MaxVio", "dead experts",
    "gating accuracy", "active FLOPs of a token", "bits per byte", "p of no difference", "p of no equivalence",
)  # fmt: skip


def study_page(
    study: Study, history_of: Callable[[str], Records], summary_of: Callable[[str], Mapping[str, Any]]
) -> str:
    """The page. `history_of` and `summary_of` give a run's records and summary, empty ones where there are none."""
    groups = read_groups(study, history_of, summary_of)
    name = str(study.analysis.get("name") or "study")
    return h.page(
        f"{name}: study",
        _opening(study, name),
        _plan(study),
        _results(study, groups),
        differences(study, groups),
        tasks_part(study, groups, summary_of),
        curves(study, groups),
        layers(groups),
        loads(groups),
        routing_part(groups),
        _settings(study),
        h.section("Every run", _every_run(study.rows)),
        _reproduction(study),
    )


def _opening(study: Study, name: str) -> Html:
    """Question and answer, with the number of runs, arms, seeds and steps behind them."""
    states, rows, analysis = Counter(row["status"] for row in study.rows), study.rows, study.analysis
    seeds = len({row["seed"] for row in rows} - {str(seed) for seed in analysis.get("tuned_on", ())})
    base_steps = (study.values.get("base") or {}).get("steps", h.NOTHING)
    steps = {str(row.get("steps", base_steps)) for row in rows}
    counts = ", ".join(f"{states[state]} {state}" for state in (FINISHED, DIVERGED, UNFINISHED) if states[state])
    known = [
        ("runs", f"{len(rows)} ({counts})"), ("arms", len(analysis["arms"])), ("seeds", seeds),
        ("steps of a run", ", ".join(sorted(steps))), ("compared with", analysis["baseline"]),
        ("compared by", "held-out nats per token"),
    ]  # fmt: skip
    notes = []
    if states[UNFINISHED]:
        notes.append(f"Not done: {states[UNFINISHED]} of {len(rows)} runs are unfinished. This is a look in between.")
    if states[DIVERGED]:
        notes.append(
            f"{states[DIVERGED]} of {len(rows)} runs diverged. An arm with such a run is never called better, worse or "
            "equivalent, and its mean is of the runs that are left."
        )
    if same := [label for label, pair in analysis["against_baseline"].items() if pair.get("identical")]:
        notes.append(
            f"Every score of {', '.join(same)} is its baseline's to the last digit: what it changes had no effect."
        )
    if seeds == 1:
        notes.append("One seed: no intervals, no verdicts. Five seeds or more can decide something.")
    elif seeds == 2:
        notes.append("Two seeds: intervals are very wide. Five seeds or more can decide something.")
    return join((
        h.paragraph("Tiny-ONN study", class_="kind"), element("h1", name),
        h.paragraph(analysis["question"], class_="question") if analysis["question"] else "",
        h.paragraph(analysis["answer"], class_="answer"), h.facts(known), *map(h.warning, notes),
    ))  # fmt: skip


def _plan(study: Study) -> Html:
    """Plan that was fixed before the runs, and a warning if study.yaml has changed since the results were judged."""
    analysis, values = study.analysis, study.values
    known = [
        ("margin of equivalence", f"± {analysis['margin']:g} nats per token"),
        ("baseline", analysis["baseline"]),
        ("falsifier", analysis["falsifier"] or "none was given"),
    ]
    note = (
        "These stand in study.yaml, which is written before the first step of the first run. A study is not resumed "
        "with other ones."
    )
    changed = [key for key in ("margin", "falsifier", "question") if key in values and values[key] != analysis[key]]
    doubt = f"Since the results were judged, study.yaml was changed: {', '.join(changed)}. Shown is what judged them."
    return element(
        "div", element("h2", "Set before the runs"), h.facts(known), h.paragraph(note, class_="note"),
        h.warning(doubt) if changed else "", class_="plan",
    )  # fmt: skip


# Arms -----------------------------------------------------------------------------------------------------------------


def _results(study: Study, groups: Sequence[Group]) -> Html:
    """The table of the arms, the best first, with what its words mean."""
    rows: list[list[object]] = []
    for group in groups:
        if len(groups) > 1:
            rows.append([f"compared with {group.baseline}"])
        rows += [_result(arm) for arm in group.best_first()]
    margin, tuned = study.analysis["margin"], study.analysis.get("tuned")
    within = study.analysis.get("matched_within", 0.05)  # what was used before analysis.json recorded it
    notes = [
        "Means over seeds of the held-out score, less is better; below them 95 % t-intervals. A difference is arm − "  # noqa: RUF001
        "baseline at the same seed, which means the same batches.",
        "better, worse: a paired t-test at 5 % finds a difference (p of no difference). equivalent: two one-sided "
        f"tests at 5 % put it within ± {margin:g} nats (p of no equivalence); the interval beside it, and its level, "
        "are those that decided. undecided: neither; that is no proof of equality. Both p are corrected for all "
        "comparisons of the study, arms and axes, by Holm's method; intervals of 95 % are not.",
        f"avg K and active FLOPs are matched within {within:.0%} of the baseline's; compute was equal where the FLOPs "
        "are: those of a forward pass, two for every active weight that is multiplied, and those of attention.",
        "Gating accuracy says nothing without its trivial value, what a random choice among a token's experts scores.",
        "MaxVio is (max − mean) / mean load. Dead are (layer, expert) pairs without a row in the last records.",  # noqa: RUF001
    ]
    if tuned:
        notes.append(_tuning(study.analysis, ", ".join(tuned)))
    table = h.table("Results of every arm", HEAD, rows, kind="verdicts")
    return h.section("Results", table, element("div", h.bullets(notes), class_="note"))


def _tuning(analysis: Mapping[str, Any], axes: str) -> str:
    """Note on the runs that chose the values of the tuned axes, and on the bias that follows."""
    if note := analysis.get("note"):
        return str(note)
    if seeds := analysis.get("tuned_on"):
        chosen = ", ".join(map(str, seeds))
        return (
            f"Every arm is shown at its best value of {axes}, chosen by runs of seeds {chosen}, which are not compared."
        )
    return (  # an analysis.json that was made before it had a note
        f"Every arm is shown at its best value of {axes}, chosen by the same held-out scores, which flatters all of "
        "them, and nothing here is corrected for it; remove analysis.json, and the report makes it anew."
    )


def _result(arm: ShownArm) -> list[object]:
    """The cells of one arm."""
    result, pair = arm.result, arm.pair or {}
    seeds = f"{result['n']} {'seed' if result['n'] == 1 else 'seeds'}"
    if result.get("seeds", result["n"]) != result["n"]:  # in a stream, a pair is of a seed and an order
        seeds = f"{result['n']} runs of {result['seeds']} seeds"
    seeds += f", {result['diverged']} diverged" if result["diverged"] else ""
    verdict = str(pair.get("verdict", "baseline"))
    beyond = "beyond the margin" if pair.get("beyond_margin") and verdict in ("better", "worse") else ""
    k, flops = (_matched(pair.get(key)) for key in ("k_matched", "flops_matched"))
    weights = element("small", f"{number(result['active_parameters'], ',.0f')} weights")
    return [
        with_small(arm_name(arm), seeds),
        with_small(h.badge(verdict), beyond),
        with_small(number(result["mean"]), bounds(result["low"], result["high"])),
        with_small(number(pair.get("difference"), "+.4f"), _interval(pair)),
        with_small(number(result["avg_k"], ".2f"), k),
        number(result["max_vio"], ".2f"),
        number(result["dead_experts"], ".1f"),
        with_small(number(result["gating_acc"], ".3f"), f"trivial {number(result['gating_trivial'], '.3f')}"),
        join((number(result.get("flops_per_token"), ",.0f"), weights, element("small", flops) if flops else "")),
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


def _settings(study: Study) -> Html:
    """Settings of each arm, and the axes that every arm takes."""
    rows: list[list[object]] = []
    for arm in study.values.get("arms") or ():
        changes = ", ".join(f"{key} = {value}" for key, value in flatten(arm.get("set") or {}).items())
        rows.append([arm.get("name"), changes or "nothing: the base as it is"])
    for key, points in (study.values.get("axes") or {}).items():
        rows.append([f"every arm at {key}", ", ".join(map(str, points))])
    if not rows:
        return Html("")
    return h.section("What the arms change", h.table("What the arms change", ["arm", "sets"], rows, kind="words"))


# Runs -----------------------------------------------------------------------------------------------------------------


def _every_run(rows: Sequence[Row]) -> Html:
    """results.csv: the arm, the seed and the scores first, the settings behind them."""
    keys = [key for key in rows[0] if key not in ("run", "status", "arm", "seed")]
    keys.sort(key=lambda key: key not in MEASURES)
    head = ["run", "status", "arm", "seed", *keys]
    body = [[row["run"], h.badge(row["status"]), *(row[key] or h.NOTHING for key in head[2:])] for row in rows]
    return h.table("Every run", head, body, kind="every", tall=len(rows) > 12)


def _reproduction(study: Study) -> Html:
    """The commands, the versions, the file."""
    again = shlex.quote(f"{study.folder.rstrip('/')}-again")
    described = shlex.quote(str(Path(study.folder) / "study.yaml"))
    note = (
        "Parameters and batches follow from the seeds, so the same data and versions give the same numbers, up to "
        "rounding. The data `stdlib` is the source text of the Python that runs the program."
    )
    return join((
        h.section(
            "How to reproduce",
            h.listing("Commands", f"tiny-onn study {described} --out {again}\ntiny-onn report {again}"),
            h.paragraph(note, class_="note"),
            h.facts([("versions of what wrote this page", h.versions())]),
        ),
        h.section("Configuration", h.paragraph("study.yaml", class_="note"), h.listing("study.yaml", study.text)),
    ))  # fmt: skip
