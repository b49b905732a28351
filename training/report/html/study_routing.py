"""The part of a study's page about routers: regret, agreement of the kinds of surprise, co-activation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.report.html.arms import Arm
from training.report.html.charts import Chart
from training.report.html.heat_maps import NO_ROW, TOP, level_map
from training.report.html.page import Cell
from training.report.html.wording import MINUS, NOTHING, number

RULES = {  # rule of `training.study.routing_analysis.regret_facts` -> head of its column
    "router": "router's first choice", "random": "any at random", "visited random": "visited, at random",
    "w2": "least w2 surprise", "unweighted": "unweighted", "experts": "experts", "input": "input", "benefit": "benefit",
    "weight": "lowest weight", "visited best": "visited, the best",
}  # fmt: skip
PAIRS = (
    ("w2", "unweighted"), ("w2", "experts"), ("w2", "input"), ("w2", "benefit"), ("w2", "weight"), ("w2", "oracle"),
    ("experts", "oracle"), ("benefit", "oracle"), ("weight", "oracle"),
)  # fmt: skip


def routing_values(every: Sequence[Arm]) -> dict[str, Any] | None:
    """Values of the template's part; None where no run was analysed."""
    arms = [arm for arm in every if arm.result.get("routing")]
    if not arms:
        return None
    facts = arms[0].result["routing"]
    return {
        "regret_head": ["arm", *RULES.values(), "hits"],
        "regret": [_regret(arm) for arm in arms],
        "sampled": number(facts.get("sampled"), ".0f"),
        "pairs_head": ["arm", *(f"{a}, {b}" for a, b in PAIRS)],
        "pairs": [[_named(arm), *(_pair(arm.result["routing"]["agreement"], *pair) for pair in PAIRS)] for arm in arms],
        "kinds": ", ".join(facts["agreement"]["kinds"]),
        "agreement_maps": [_agreement_map(arm) for arm in arms],
        "agreement_legend": [
            *((f"{1 - level / 3:+.2f}".replace("-", MINUS), f"h{level}") for level in range(TOP + 1)),
            ("not known", "unknown"),
        ],
        "together": [[_named(arm), number(arm.result["routing"].get("co_activation"), ".4f")] for arm in arms],
        "together_maps": [_together_map(arm) for arm in arms if arm.together is not None],
        "together_legend": [*((f"{level / TOP:.2f}", f"s{level}") for level in range(TOP + 1)), ("never", "none")],
    }  # fmt: skip


def _named(arm: Arm) -> Cell:
    return Cell(arm.label, slot=arm.slot)


def _regret(arm: Arm) -> list[Cell | str]:
    facts = arm.result["routing"]
    regrets = facts.get("regret") or {}
    hits = Cell(number(facts.get("oracle_hits"), ".3f"), (f"chance {number(facts.get('oracle_chance'), '.3f')}",))
    return [_named(arm), *(number(regrets.get(rule), ".4f") for rule in RULES), hits]


def _pair(agreement: Mapping[str, Any], a: str, b: str) -> Cell | str:
    if not {a, b} <= {*agreement["kinds"]}:
        return NOTHING
    row, column = agreement["kinds"].index(a), agreement["kinds"].index(b)
    tau, top1 = (_at(agreement[key], row, column) for key in ("tau", "top1"))
    return Cell(number(tau, "+.2f"), (f"same {number(top1, '.2f')}" if top1 is not None else "",))


def _at(matrix: Any, row: int, column: int) -> Any:
    """An entry; None where nothing is known, of it or of the whole row."""
    return matrix[row][column] if matrix and matrix[row] else None


def _agreement_map(arm: Arm) -> Chart:
    agreement = arm.result["routing"]["agreement"]
    kinds, indices = [*map(str, agreement["kinds"])], range(len(agreement["kinds"]))
    tau = np.array([[_at(agreement["tau"], row, column) for column in indices] for row in indices], dtype=float)
    spec = level_map([("", TOP * (1 - tau) / 2, tau)], "h", "rank agreement", ("", ""), names=kinds)
    rows = [[kind, *(number(value, "+.2f") for value in row)] for kind, row in zip(kinds, tau.tolist(), strict=True)]
    return Chart(
        arm.label, "", f"rank agreement of {arm.label}", spec, ("", *kinds), rows, arm=arm.label, slot=arm.slot
    )


def _together_map(arm: Arm) -> Chart:
    """Cosines of co-activation, a frame a layer."""
    levels = np.where(
        np.isnan(arm.together), np.nan, np.where(arm.together > 0, TOP * np.nan_to_num(arm.together), NO_ROW)
    )
    frames = [(f"layer {layer}", *pair) for layer, pair in enumerate(zip(levels, arm.together, strict=True))]
    spec = level_map(frames, "s", "of visits in common", ("expert", "expert"))
    apart = np.where(np.eye(arm.together.shape[1], dtype=bool), np.nan, arm.together)  # of an expert with others
    known = [(layer, pairs[np.isfinite(pairs)]) for layer, pairs in enumerate(apart)]
    rows = [[f"layer {i}", number(float(v.mean()), ".2f"), number(float(v.max()), ".2f")] for i, v in known if v.size]
    said, head = f"experts visited together, {arm.label}", ("", "mean of pairs", "highest")
    return Chart(arm.label, arm.shown_run, said, spec, head, rows, arm=arm.label, slot=arm.slot)
