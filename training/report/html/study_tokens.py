"""The part of a study's page about tokens: variance of the benefit that the token id explains, and the token atlas."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from training.report.html.arms import Arm
from training.report.html.charts import Chart, text_of
from training.report.html.heat_maps import MOST_EXPERTS, NO_ROW, TOP, Legend, level_map
from training.report.html.point_charts import Points, point_chart
from training.report.html.wording import MINUS, NOTHING, number
from training.storage.token_atlas import Visits

AtlasOf = Callable[[str], Sequence[Visits]]  # run -> its token_atlas.csv; empty where there is none
SHOWN = 20  # token ids of a map, the most frequent ones
SHARES = {"token": "by token id", "token_expert": "by token id and expert"}


def token_values(arms: Sequence[Arm], atlas_of: AtlasOf) -> dict[str, Any] | None:
    """Values of the template's part; None where no run has an atlas."""
    known = [arm for arm in arms if _shares(arm)]
    if not known:
        return None
    atlases = [(arm, rows) for arm in known if (rows := atlas_of(arm.shown_run))]
    sizes = [abs(row.benefit) for _, rows in atlases for row in _frequent(rows)]
    scale = float(np.percentile(sizes, 95)) if sizes else 0.0
    return {
        "occurrences": number(_shares(known[0]).get("occurrences"), ",.0f"),
        "arms": [(arm.label, arm.short, arm.slot, arm.lost) for arm in sorted(known, key=lambda arm: arm.slot)],
        "shares": [_share_chart(key, title, known) for key, title in SHARES.items()],
        "maps": [_map(arm, rows, scale or 1.0) for arm, rows in atlases],
        "legend": atlas_legend(scale),
        "shown": SHOWN,
    }


def atlas_legend(scale: float) -> Legend:
    """Colours of the atlas."""
    levels = [(level / (TOP / 2) - 1) * scale for level in range(TOP + 1)]
    ends = {0: " nats, helps", TOP: " nats, harms"}
    named = [(f"{value:+.3g}".replace("-", MINUS) + ends.get(i, ""), f"h{i}") for i, value in enumerate(levels)]
    return [*named, ("not visited", "none")]


def _shares(arm: Arm) -> Mapping[str, Any]:
    return (arm.result.get("routing") or {}).get("benefit_variance") or {}


def _share_chart(key: str, title: str, arms: Sequence[Arm]) -> Chart:
    """omega^2 over layers, a line an arm."""
    values = {arm.label: _shares(arm).get(key) or [] for arm in arms}
    layers = [str(layer) for layer in range(max(map(len, values.values())))]
    drawn = [
        Points(
            arm.label, arm.short, arm.slot, layers[: len(values[arm.label])], values[arm.label],
            [f"{arm.label}, layer {i}: {number(y, '.3f')}" for i, y in enumerate(values[arm.label])], lines=True,
        )
        for arm in arms
    ]  # fmt: skip
    rows = [[arm.label, *(number(y, ".3f") for y in values[arm.label])] for arm in arms]
    head = ("share explained", *(f"layer {layer}" for layer in layers))
    return point_chart(title, "share of variance", drawn, ("layer", "omega squared"), head, rows, categories=layers)


def _frequent(rows: Sequence[Visits]) -> list[Visits]:
    """The rows of the most frequent token ids."""
    counts = {row.token_id: row.occurrences for row in rows}
    kept = sorted(counts, key=lambda token: (-counts[token], token))[:SHOWN]
    return [row for row in rows if row.token_id in kept]


def _map(arm: Arm, rows: Sequence[Visits], scale: float) -> Chart:
    """Mean benefit of each frequent token id's experts, a frame a layer."""
    rows = _frequent(rows)
    tokens = {row.token_id: (row.token, row.occurrences) for row in rows}
    order = sorted(tokens, key=lambda token: (-tokens[token][1], token))
    layers, experts = 1 + max(row.layer for row in rows), 1 + max(row.expert for row in rows)
    benefit = np.full((layers, len(order), experts), np.nan)
    said = [[["not visited"] * experts for _ in order] for _ in range(layers)]
    for row in rows:
        place = order.index(row.token_id)
        benefit[row.layer, place, row.expert] = row.benefit
        said[row.layer][place][row.expert] = text_of(_said(row), 200)
    half = TOP / 2
    levels = np.where(np.isnan(benefit), NO_ROW, (half + half * np.nan_to_num(benefit) / scale).clip(0, TOP))
    frames = [(f"layer {layer}", levels[layer], benefit[layer]) for layer in range(layers)]
    names = [_visible(tokens[token][0]) for token in order]
    spec = level_map(frames, "h", "nats", ("token", "expert"), names=names)
    del spec["layout"]["xaxis"]["tickvals"], spec["layout"]["xaxis"]["ticktext"]
    spec["layout"]["xaxis"]["dtick"] = max(1, -(-experts // 8))
    if experts <= MOST_EXPERTS:
        spec["data"][0] |= {"text": said[-1], "hovertemplate": "%{text}<extra></extra>"}
        for frame, texts in zip(spec.get("frames", ()), said, strict=False):
            frame["data"][0]["text"] = texts
    head = ("token", "occurrences", *(f"layer {layer}: most visited" for layer in range(layers)))
    table = [
        [
            _visible(tokens[token][0]),
            str(tokens[token][1]),
            *(_most_visited(rows, token, layer) for layer in range(layers)),
        ]
        for token in order
    ]
    words = f"{arm.label}: mean benefit of the experts of {len(order)} tokens, layer by layer"
    return Chart(arm.label, arm.shown_run, words, spec, head, table, arm=arm.label, slot=arm.slot)


def _said(row: Visits) -> str:
    return (
        f"{_visible(row.token)}, expert {row.expert}: {_estimate(row)} nats, {row.visits} of {row.occurrences} visits"
    )


def _visible(token: str) -> str:
    """The spelling of a token with its spaces."""
    return token.replace(" ", "\u2423")


def _estimate(row: Visits) -> str:
    error = "" if row.standard_error is None else f" \u00b1 {number(row.standard_error, '.2g')}"
    return f"{number(row.benefit, '+.3g')}{error}"


def _most_visited(rows: Sequence[Visits], token: int, layer: int) -> str:
    """The expert that a token id visits most often, its share of the occurrences, and its benefit."""
    of = [row for row in rows if (row.token_id, row.layer) == (token, layer)]
    if not of:
        return NOTHING
    row = max(of, key=lambda row: row.visits)
    return f"{row.expert} ({row.visits / row.occurrences:.0%}): {_estimate(row)}"
