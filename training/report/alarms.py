"""Collapse alarms: what the last steps' records say about the router, and which setting to change.

Thresholds, each over the mean of the last WINDOW records and silent before MIN_RECORDS of them:
one expert per token = avg_k at most 1.1; dead = a tenth or more of the (layer, expert) pairs without one row in the
window; taken over = one expert holds 90 % of the most that an expert can hold in its layer, and 1.5 fair shares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 20
MIN_RECORDS = 5
ONE_EXPERT = 1.1  # avg_k at or below this counts as one expert per token
DEAD_SHARE = 0.1
TAKEN_SHARE = 0.9
TAKEN_OVER_FAIR = 1.5  # so that few experts with many slots each are no takeover
SUSPICIOUS_GATING = 0.9  # gating accuracy that a reader could take for success

Records = Sequence[Mapping[str, Any]]


def collapse_alarms(
    history: Records,
    num_experts: int,
    *,
    num_experts_per_tok: int = -1,
    min_experts_per_tok: int = 1,
    max_experts_per_tok: int | None = None,
) -> list[str]:
    """One or two sentences for every way in which routing has collapsed; [] while it is healthy.

    Args:
        history: records of steps, oldest first, with keys as in `metrics.jsonl`; unknown values are None or absent.
        num_experts: experts per layer (E).
        num_experts_per_tok, min_experts_per_tok, max_experts_per_tok: as in ModelConfig.
    """
    if num_experts < 2:
        return []
    dynamic = num_experts_per_tok < 1
    fewest = min_experts_per_tok if dynamic else num_experts_per_tok
    most = (max_experts_per_tok or num_experts) if dynamic else num_experts_per_tok
    window = history[-WINDOW:]
    load = _loads(window, num_experts)
    found = [
        _single_expert(history, window) if most > 1 else None,
        _dead(load),
        _taken_over(load, fewest) if fewest < num_experts else None,
    ]
    return [alarm for alarm in found if alarm is not None]


def _single_expert(history: Records, window: Records) -> str | None:
    seen = _numbers(window, "avg_k")
    if len(seen) < MIN_RECORDS or np.mean(seen) > ONE_EXPERT:
        return None
    now, first = float(np.mean(seen)), float(np.mean(_numbers(history[:WINDOW], "avg_k") or seen))
    change = f"has fallen from {first:.2f} to {now:.2f}" if first > now + 0.1 else f"is {now:.2f}"
    gating = _numbers(window, "gating_acc")
    success = ""
    if gating and np.mean(gating) >= SUSPICIOUS_GATING:
        success = f": the gating accuracy of {np.mean(gating):.2f} is this collapse, not success"
    return (
        f"One expert per token: avg_k {change}, so each token's only expert is its own target and nothing else is "
        f"tried{success}. Set --model.min-experts-per-tok 2 or --hyper.explore-prob 0.05, or raise --hyper.pi-alpha."
    )


def _dead(load: np.ndarray | None) -> str | None:
    if load is None:
        return None
    dead = (load == 0).all(axis=0)
    if dead.mean() < DEAD_SHARE:
        return None
    layer = int(dead.sum(axis=1).argmax())
    return (
        f"Dead experts: {dead.sum()} of {dead.size} ({dead.mean():.0%}) got no token in the last {len(load)} records, "
        f"most of them in layer {layer} ({dead[layer].sum()} of {dead.shape[1]}). "
        "Set --hyper.balance-weight 0.01 or --hyper.bias-speed 0.001, or let tokens try others with "
        "--hyper.explore-prob 0.05."
    )


def _taken_over(load: np.ndarray | None, fewest: int) -> str | None:
    if load is None:
        return None
    mean = load.mean(axis=0)
    layer, expert = (int(i) for i in np.unravel_index(mean.argmax(), mean.shape))
    share, fair = mean[layer, expert], 1 / mean.shape[1]
    limit = max(TAKEN_SHARE / fewest, TAKEN_OVER_FAIR * fair)
    if share <= limit:
        return None
    layers = int((mean.max(axis=1) > limit).sum())
    also = f"; {layers} of {len(mean)} layers are taken over so" if layers > 1 else ""
    return (
        f"One expert takes over: expert {expert} of layer {layer} gets {share:.0%} of the layer's routed rows "
        f"(fair share {fair:.1%}){also}. Set --hyper.balance-weight 0.01 or --hyper.bias-speed 0.001."
    )


def _numbers(records: Records, key: str) -> list[float]:
    return [float(r[key]) for r in records if isinstance(r.get(key), int | float) and np.isfinite(r[key])]


def _loads(window: Records, num_experts: int) -> np.ndarray | None:
    """(records, L, E) loads of the window without the records that routed nothing; None if too few are left."""
    kept: list[np.ndarray] = []
    for record in window:
        try:
            load = np.asarray(record.get("expert_load"), dtype=float)
        except (TypeError, ValueError):
            continue
        if load.ndim == 2 and load.shape[1] == num_experts and np.isfinite(load).all() and load.any():
            kept.append(load)
    kept = [load for load in kept if load.shape == kept[-1].shape]
    return np.stack(kept) if len(kept) >= MIN_RECORDS else None
