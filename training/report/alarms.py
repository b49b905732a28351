"""Collapse alarms: what the last steps' records say about the router, and which setting to change.

Thresholds, each over the mean of the last WINDOW records and silent before MIN_RECORDS of them:
one expert per token = avg_k at most 1.1; dead = a tenth or more of the (layer, expert) pairs without one row in the
window; taken over = one expert holds 90 % of the most that an expert can hold in its layer, and 1.5 fair shares.

Steps of the warm-up do not count: routing is meant to move there. What an alarm advises is what was tried
(docs/lab-log.md, 600 steps of the default sizes) and what the run does not have yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW = 20
MIN_RECORDS = 5
ONE_EXPERT = 1.1  # avg_k at or below this counts as one expert per token
DEAD_SHARE = 0.1
TAKEN_SHARE = 0.9
TAKEN_OVER_FAIR = 1.5  # so that few experts with many slots each are no takeover
ENOUGH_BIAS = 0.01  # with which no expert of the default sizes was dead, and none took over
ENOUGH_BALANCE, ENOUGH_EXPLORED = 1.0, 0.05  # with which none was dead
STRONG_BALANCE = 3.0  # with which none took over where 1 left one for some fifty steps; exploring did not help
ENOUGH_BUDGET = 0.9  # with which tokens kept 8 of 16 experts where 0.5 left one
EXPORTED = " (which `tiny-onn export` refuses: Qwen3-MoE has no bias in its router)"
SUSPICIOUS_GATING = 0.9  # gating accuracy that a reader could take for success

Records = Sequence[Mapping[str, Any]]


class Guards(NamedTuple):
    """Settings of a run that prevent routing collapse, by the names of HyperParams."""

    warmup_steps: int | float = 0
    balance_weight: float = 0.0
    bias_speed: float = 0.0
    explore_prob: float = 0.0
    pi_alpha: float = 0.5
    router_lr: float = 1e-3
    freeze_step: int | float = 0


UNGUARDED = Guards()


def collapse_alarms(
    history: Records,
    num_experts: int,
    *,
    num_experts_per_tok: int = -1,
    min_experts_per_tok: int = 1,
    max_experts_per_tok: int | None = None,
    guards: Guards = UNGUARDED,
) -> list[str]:
    """One or two sentences for every way in which routing has collapsed; [] while it is healthy.

    Args:
        history: records of steps, oldest first, with keys as in `metrics.jsonl`; unknown values are None or absent.
        num_experts: experts per layer (E).
        num_experts_per_tok, min_experts_per_tok, max_experts_per_tok: as in ModelConfig.
        guards: of the run; the advice follows from them.
    """
    if num_experts < 2:
        return []
    dynamic = num_experts_per_tok < 1
    fewest = min_experts_per_tok if dynamic else num_experts_per_tok
    most = (max_experts_per_tok or num_experts) if dynamic else num_experts_per_tok
    window = [record for record in history[-WINDOW:] if _is_past(record, guards.warmup_steps)]
    last = window[-1].get("step", 0) if window else 0
    load = _loads(window, num_experts)
    alarms = [
        _single_expert(history, window, _widen(guards)) if most > 1 else None,
        _dead(load, _even_out(guards, last, ENOUGH_BALANCE, ENOUGH_EXPLORED)),
        _taken_over(load, fewest, dynamic, _even_out(guards, last, STRONG_BALANCE)) if fewest < num_experts else None,
    ]
    return [alarm for alarm in alarms if alarm is not None]


def _is_past(record: Mapping[str, Any], warmup_steps: int | float) -> bool:
    step = record.get("step")
    return not isinstance(step, int | float) or step > warmup_steps


# Advice ---------------------------------------------------------------------------------------------------------------


def _even_out(guards: Guards, step: int | float, balance: float, explored: float = 0.0) -> str:
    """Advice that spreads the load over the experts: the settings, up to what was seen to help, that the run lacks.

    Args:
        balance, explored: the balance weight and the share of exploration that help; 0 for one that does not.
    """
    if 0 < guards.freeze_step <= step:
        return f"The router does not learn after step {guards.freeze_step:g}: set --hyper.freeze-step higher, or 0."
    if not guards.router_lr:
        bias = " or " + _raise("bias_speed", guards.bias_speed, ENOUGH_BIAS) if guards.bias_speed < ENOUGH_BIAS else ""
        return f"The router does not learn: set --hyper.router-lr 0.001{bias}."
    mends = []
    if guards.balance_weight < balance:
        mends.append(_raise("balance_weight", guards.balance_weight, balance))
    if guards.bias_speed < ENOUGH_BIAS:
        mends.append(_raise("bias_speed", guards.bias_speed, ENOUGH_BIAS) + EXPORTED)
    if guards.explore_prob < explored:
        mends.append(_raise("explore_prob", guards.explore_prob, explored))
    if not mends:
        return "The run has every setting that is known to help; fewer experts (--model.num-experts) may."
    return f"Set {', or '.join(mends)}."


def _widen(guards: Guards) -> str:
    """Advice that lets a token visit more experts than one; exploring with 0.05 or a balance weight of 1 does not."""
    mends = ["--model.min-experts-per-tok 2"]
    if guards.pi_alpha < ENOUGH_BUDGET:
        mends.append(_raise("pi_alpha", guards.pi_alpha, ENOUGH_BUDGET))
    return f"Set {', or '.join(mends)}."


def _raise(name: str, value: float, wanted: float) -> str:
    flag = f"--hyper.{name.replace('_', '-')} {wanted:g}"
    return f"{flag} (it is {value:g})" if value else flag


# Alarms ---------------------------------------------------------------------------------------------------------------


def _single_expert(history: Records, window: Records, mends: str) -> str | None:
    avg_k = _numbers(window, "avg_k")
    if len(avg_k) < MIN_RECORDS or np.mean(avg_k) > ONE_EXPERT:
        return None
    now, first = float(np.mean(avg_k)), float(np.mean(_numbers(history[:WINDOW], "avg_k") or avg_k))
    change = f"has fallen from {first:.2f} to {now:.2f}" if first > now + 0.1 else f"is {now:.2f}"
    gating = _numbers(window, "gating_acc")
    success = ""
    if gating and np.mean(gating) >= SUSPICIOUS_GATING:
        success = f": the gating accuracy of {np.mean(gating):.2f} is this collapse, not success"
    return (
        f"One expert per token: avg_k {change}, so each token's only expert is its own target and nothing else is "
        f"tried{success}. {mends}"
    )


def _dead(load: np.ndarray | None, mends: str) -> str | None:
    if load is None:
        return None
    dead = (load == 0).all(axis=0)
    if dead.mean() < DEAD_SHARE:
        return None
    layer = int(dead.sum(axis=1).argmax())
    return (
        f"Dead experts: {dead.sum()} of {dead.size} ({dead.mean():.0%}) got no token in the last {len(load)} records, "
        f"most of them in layer {layer} ({dead[layer].sum()} of {dead.shape[1]}). {mends}"
    )


def _taken_over(load: np.ndarray | None, fewest: int, dynamic: bool, mends: str) -> str | None:
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
    got = f"{share:.0%} of the layer's visits" if dynamic else f"{min(1, share * fewest):.0%} of the tokens"
    return (
        f"One expert takes over: expert {expert} of layer {layer} gets {got} "
        f"(a fair share is {fair * (1 if dynamic else fewest):.0%}){also}. {mends}"
    )


def kind_of(alarm: str) -> str:
    """Name of an alarm, the same as long as it is on: what stands before its colon."""
    return alarm.partition(":")[0]


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
