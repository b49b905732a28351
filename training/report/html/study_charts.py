"""The pictures of a study's page: differences to the baseline, learning curves, loads of the experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.report.html import elements as h
from training.report.html.charts import Difference, forest, legend, line_chart
from training.report.html.elements import Html, bounds, element, join, level_note, number, with_small
from training.report.html.heat_maps import alarm_counts, load_legend, load_map
from training.report.html.study_arms import Group, ShownArm, Study, scores_by_seed
from training.report.html.study_layers import LAYERED, layer_key, shown_layers

CHARTS = (
    ("Training loss", "nats per token", "main_loss"),
    ("Held-out loss", "nats per token", "held_out_nats"),
    ("Load imbalance, MaxVio", "(max − mean) / mean load", "max_vio"),  # noqa: RUF001
    ("Experts per token", "avg K", "avg_k"),
    ("Routing drift", "share of first choices that changed since the evaluation before", "routing_drift"),
)


def differences(study: Study, groups: Sequence[Group]) -> Html:
    """A forest plot for every baseline."""
    parts: list[Html] = []
    for group in groups:
        theirs = next((scores_by_seed(study, arm) for arm in group.arms if arm.label == group.baseline), {})
        rows = []
        for arm in (arm for arm in group.best_first() if arm.pair is not None):
            ours = scores_by_seed(study, arm)
            rows.append(_difference(arm, [score - theirs[seed] for seed, score in ours.items() if seed in theirs]))
        if rows:
            parts += [element("h3", f"compared with {group.baseline}"), forest(rows, study.analysis["margin"])]
    if not parts:
        return Html("")
    note = (
        "Large dots are mean differences, lines their 95 % intervals (not corrected for the number of comparisons; of "
        "an equivalent arm the interval that decided it, which is), small dots single pairs of runs. "
        f"The band is the margin, ± {study.analysis['margin']:g} nats. ◂ or ▸ at the edge: the "
        "interval goes on beyond the frame."
    )
    return h.section("Differences to the baseline", h.paragraph(note, class_="note"), *parts)


def _difference(arm: ShownArm, each: Sequence[float]) -> Difference:
    pair = arm.pair or {}
    interval = bounds(pair["low"], pair["high"], "+.4f") + level_note(pair) or "no interval"
    name = join((element("span", arm.short, " "), h.badge(pair["verdict"])))
    value = with_small(number(pair["difference"], "+.4f"), interval)
    return Difference(name, pair["difference"], pair["low"], pair["high"], each, pair["verdict"], value)


def curves(study: Study, groups: Sequence[Group]) -> Html:
    """The charts of CHARTS for every baseline, one colour an arm."""
    base = study.values.get("base") or {}
    parts: list[Html] = []
    for group in groups:
        if len(groups) > 1:
            parts.append(element("h3", f"compared with {group.baseline}"))
        drawn = sorted(group.arms, key=lambda arm: arm.slot)
        begun = any(len(arm.curves["main_loss"].x) for arm in drawn)
        charts = [
            line_chart(title, unit, [arm.curves[key] for arm in drawn], empty=_why_empty(key, base, begun))
            for title, unit, key in CHARTS
        ]
        names = [(join((arm.short, _lost(arm))), arm.slot) for arm in drawn]
        parts += [legend(names), element("div", *charts, class_="charts")]
    note = "Means over seeds. The training loss is that of the step's own batch, before the update."
    if base.get("eval_every"):
        note += (
            f" Held-out losses are of the first {base.get('eval_bytes')} held-out bytes during the runs, and of "
            f"{base.get('final_eval_bytes') or 'all'} in the table."
        )
    return h.section("Learning curves", h.paragraph(note, class_="note"), *parts)


def layers(groups: Sequence[Group]) -> Html:
    """The charts of LAYERED for every baseline and the first, the middle and the last layer."""
    parts: list[Html] = []
    for group in groups:
        drawn = [arm for arm in sorted(group.arms, key=lambda arm: arm.slot) if arm.layers]
        if not drawn:
            continue
        if len(groups) > 1:
            parts.append(element("h3", f"compared with {group.baseline}"))
        charts = []
        for name, unit in LAYERED:
            for layer in shown_layers(max(arm.layers for arm in drawn)):
                key = layer_key(name, layer)
                known = [arm.curves[key] for arm in drawn if key in arm.curves]
                if any(curve.x.size for curve in known):
                    charts.append(line_chart(f"{key[0].upper()}{key[1:]}", unit, known))
        parts += [legend([(arm.short, arm.slot) for arm in drawn]), element("div", *charts, class_="charts")]
    note = (
        "Means over seeds. Load entropy is 1 where all experts of the layer get equally many rows and 0 where one gets "
        "all. Co-activation, measured on held-out text when the runs are scored (eval_every, analysis_tokens), says "
        "how far the pairs of experts that tokens visit together are from what the loads alone would give."
    )
    return h.section("Load over time, layer by layer", h.paragraph(note, class_="note"), *parts) if parts else Html("")


def _lost(arm: ShownArm) -> Html:
    if not arm.ends:
        return Html("")
    steps = ", ".join(str(step) for step in sorted(arm.ends.values()))
    return element("small", f" ({len(arm.ends)} diverged, at step {steps}; then the mean of those left)")


def _why_empty(key: str, base: Mapping[str, Any], begun: bool) -> str:
    """Why a chart has no line; `begun` says whether there are records at all."""
    if key == "held_out_nats" and begun:
        every = base.get("eval_every") or 0
        wanted = f"eval_every: {every}, " + (f"steps: {base.get('steps')}" if every else "which asks for none")
        return f"No score was made during the runs ({wanted}). The final ones are in the table."
    if key == "routing_drift":
        return "Drift was not measured: it wants eval_every and analysis_tokens."
    return "No record yet."


def loads(groups: Sequence[Group]) -> Html:
    """A map for every arm, and the alarms of its runs."""
    arms = [arm for group in groups for arm in group.arms]
    maps = [load_map(with_small(arm.label, arm.load_run), arm.load) for arm in arms]
    note = (
        "Share of a layer's routed rows that each expert got, mean of the last records: layers downwards, experts to "
        "the right. Of one run an arm: experts of different seeds are strangers, and their mean would look even."
    )
    ringing = []
    for arm in arms:
        kinds = [f"{kind.lower()} in {count} of {len(arm.alarms)} runs" for kind, count in alarm_counts(arm.alarms)]
        ringing += [f"{arm.label}: {', '.join(kinds)}"] if kinds else []
    alarms = h.warning(element("strong", "Collapse alarms at the end"), h.bullets(ringing)) if ringing else ""
    return h.section(
        "Load of the experts at the end", h.paragraph(note, class_="note"), load_legend(),
        element("div", *maps, class_="maps"), alarms,
    )  # fmt: skip
