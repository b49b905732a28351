"""The part of a study's page about routers: regret, agreement of the kinds of surprise, co-activation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.report.html import elements as h
from training.report.html.elements import Html, element, number, with_small
from training.report.html.heat_maps import NONE, UNKNOWN, heat_map, map_legend
from training.report.html.study_arms import Group, ShownArm
from training.report.html.study_layers import shown_layers

RULES = {  # rule of `training.study.routing_analysis.regret_facts` -> head of its column
    "router": "router's first choice", "random": "any at random", "visited random": "visited, at random",
    "w2": "least w2 surprise", "unweighted": "unweighted", "experts": "experts", "input": "input", "benefit": "benefit",
    "weight": "lowest weight", "visited best": "visited, the best",
}  # fmt: skip
PAIRS = (
    ("w2", "unweighted"), ("w2", "experts"), ("w2", "input"), ("w2", "benefit"), ("w2", "weight"), ("w2", "oracle"),
    ("experts", "oracle"), ("benefit", "oracle"), ("weight", "oracle"),
)  # fmt: skip
SIDE = 3  # levels of agreement on either side of none


def routing_part(groups: Sequence[Group]) -> Html:
    """The sections; nothing where no run was analysed."""
    arms = [arm for group in groups for arm in group.best_first() if arm.result.get("routing")]
    if not arms:
        return Html("")
    return h.join((_regret(arms), _agreement(arms), _meetings(arms)))


def _regret(arms: Sequence[ShownArm]) -> Html:
    rows: list[list[object]] = []
    for arm in arms:
        facts = arm.result["routing"]
        regrets = facts.get("regret") or {}
        hits = with_small(
            number(facts.get("oracle_hits"), ".3f"), f"chance {number(facts.get('oracle_chance'), '.3f')}"
        )
        rows.append([arm.label, *(number(regrets.get(rule), ".4f") for rule in RULES), hits])
    sampled = number(arms[0].result["routing"].get("sampled"), ".0f")
    notes = [
        "Nats that a token's own next-token loss lies above the best expert's, when in one layer that token alone is "
        f"sent to the expert that the rule points at, with weight 1. About {sampled} held-out tokens a layer, the "
        "same ones for every run; means over layers, then seeds.",
        "The kinds of surprise know the visited experts only: compare them with a visited one at random and with the "
        "best visited one. Surprise that is no better than random says nothing about which expert is good.",
        "Hits: the router's first choice is the oracle's expert.",
    ]
    table = h.table("Regret against the counterfactual oracle", ["arm", *RULES.values(), "hits"], rows)
    title = "Regret against the counterfactual oracle"
    return h.section(title, table, element("div", h.bullets(notes), class_="note"))


def _agreement(arms: Sequence[ShownArm]) -> Html:
    rows: list[list[object]] = []
    for arm in arms:
        agreement = arm.result["routing"]["agreement"]
        rows.append([arm.label, *(_pair(agreement, *pair) for pair in PAIRS)])
    head = ["arm", *(f"{a}, {b}" for a, b in PAIRS)]
    kinds = ", ".join(arms[0].result["routing"]["agreement"]["kinds"])
    note = (
        "Kendall's tau-b of two rankings of the experts that a token visits, mean over held-out tokens with two or "
        f"more; 1 is the same order, 0 none in common, {h.MINUS}1 the reverse. Below it the share of tokens whose "
        f"lowest expert is the same. Rows and columns of the maps: {kinds}."
    )
    maps = [_agreement_map(arm.label, arm.result["routing"]["agreement"]) for arm in arms]
    return h.section(
        "Agreement of the kinds of surprise", h.paragraph(note, class_="note"),
        h.table("Agreement of the kinds of surprise", head, rows), _agreement_legend(),
        element("div", *maps, class_="maps"),
    )  # fmt: skip


def _pair(agreement: Mapping[str, Any], a: str, b: str) -> object:
    if not {a, b} <= {*agreement["kinds"]}:
        return h.NOTHING
    row, column = agreement["kinds"].index(a), agreement["kinds"].index(b)
    tau, top1 = (_at(agreement[key], row, column) for key in ("tau", "top1"))
    return with_small(number(tau, "+.2f"), f"same {number(top1, '.2f')}" if top1 is not None else "")


def _at(matrix: Any, row: int, column: int) -> Any:
    """An entry; None where nothing is known, of it or of the whole row."""
    return matrix[row][column] if matrix and matrix[row] else None


def _agreement_map(label: str, agreement: Mapping[str, Any]) -> Html:
    size = len(agreement["kinds"])
    entries = [[_at(agreement["tau"], row, column) for column in range(size)] for row in range(size)]
    tau = np.array(entries, dtype=float)
    levels = np.where(np.isnan(tau), UNKNOWN, SIDE - np.rint(np.nan_to_num(tau) * SIDE).astype(np.int64))
    return element("figure", element("figcaption", label), heat_map(levels, "h", f"rank agreement of {label}"))


def _agreement_legend() -> Html:
    names = [(f"{(SIDE - level) / SIDE:+.2f}".replace("-", h.MINUS), level) for level in range(2 * SIDE + 1)]
    return map_legend([*names, ("not known", UNKNOWN)], "h")


def _meetings(arms: Sequence[ShownArm]) -> Html:
    """Co-activation: a number an arm, and maps of one run."""
    rows = [[arm.label, number(arm.result["routing"].get("co_activation"), ".4f")] for arm in arms]
    note = (
        "How far the pairs of experts that tokens visit together are from what the experts' loads alone would give, in "
        "nats (Kullback and Leibler): 0 is chance. The maps show visits in common / √(visits of one · visits of the "
        "other), in the first, the middle and the last layer of one run an arm."
    )
    names = [(f"{level / 6:.2f}", level) for level in range(7)]
    maps = [
        _meeting_map(arm, layer)
        for arm in arms
        if arm.together is not None
        for layer in shown_layers(len(arm.together))
    ]
    return h.section(
        "Experts that are visited together", h.paragraph(note, class_="note"),
        h.table("Experts that are visited together", ["arm", "co-activation, nats"], rows),
        map_legend([*names, ("never", NONE)], "s") if maps else "", element("div", *maps, class_="maps"),
    )  # fmt: skip


def _meeting_map(arm: ShownArm, layer: int) -> Html:
    assert arm.together is not None
    cosine = arm.together[layer]
    levels = np.where(np.isnan(cosine), UNKNOWN, np.where(cosine > 0, np.rint(np.nan_to_num(cosine) * 6), NONE))
    picture = heat_map(levels.astype(np.int64), "s", f"experts visited together, {arm.label}, layer {layer}")
    return element("figure", element("figcaption", with_small(arm.label, f"layer {layer}, {arm.load_run}")), picture)
