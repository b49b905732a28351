"""Sums over tokens and counts by expert: what a step adds up, over parts of a batch and over processes."""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.primitives.fused import Values, fused
from training.step.main_pass import PassResult
from training.step.rules import Targets


def routed_rows(
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
    num_experts: int,
) -> Int[Tensor, "*runs layers experts"]:
    """Rows of each layer that each expert got.

    Args:
        expert_ids: in [0, num_experts) on active slots, anything elsewhere.
        active: which slots are routed.
    """
    flat = "... tokens slots -> ... (tokens slots)"
    return counts(rearrange(expert_ids, flat), rearrange(active, flat), num_experts)


def counts(
    index: Int[Tensor, "*runs layers rows"], counted: Bool[Tensor, "*runs layers rows"], bins: int
) -> Int[Tensor, "*runs layers bins"]:
    """Each layer's counted rows that fall into each bin; uncounted rows go to a spare bin first."""
    index = torch.where(counted, index, bins)
    empty = index.new_zeros((*index.shape[:-1], bins + 1))
    return empty.scatter_add(-1, index, torch.ones_like(index))[..., :bins]


def count_visits(
    active: Bool[Tensor, "*runs layers tokens slots"], real: Bool[Tensor, "*runs tokens"]
) -> Int[Tensor, "*runs"]:
    """Visits of real tokens to experts, over all layers."""
    return (active & rearrange(real, "... tokens -> ... 1 tokens 1")).sum(dim=(-3, -2, -1))


def finite_sum(x: Float[Tensor, "..."], dim: int | None = None) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
    """(sum, number) of the finite entries, over all of x or one axis."""
    kept, finite = _finite_or_zero(x), x.isfinite()
    return (kept.sum(), finite.sum()) if dim is None else (kept.sum(dim=dim), finite.sum(dim=dim))


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), as_float(x), 0.0)


def as_float(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


class Sums(NamedTuple):
    """Sums over tokens and counts of them: those of a batch's parts add up to those of the batch.

    A number of each run unless a shape is given; counts are integers.
    """

    loss: Tensor  # nats
    targets: Tensor  # target tokens
    correct: Tensor
    entropy: Tensor  # nats
    distill: Tensor  # nats
    real: Tensor  # tokens
    visits: Tensor  # real (layer, token, expert)
    informative: Tensor  # (layer, token)
    hits: Tensor  # informative (layer, token) whose preferred expert is the target
    chance: Tensor  # hits that a routed expert at random would score
    tied: Tensor  # (layer, token)
    routed: Tensor  # (L, E) rows
    wanted: Tensor  # (L, E) informative tokens whose target it is
    surprise: Tensor
    surprised: Tensor  # (layer, token, expert) with a surprise
    expert_surprise: Tensor  # (L, E)
    expert_surprised: Tensor  # (L, E)
    nonfinite: Tensor
    token_visits: Any = ()  # (L, V, E) visits to experts by the token's id; nothing without a table that counts
    router_inputs: Any = ()  # (L, D, E) inputs of each expert's rows, where a router is their mean
    expert_outputs: Any = ()  # (L, E, D) outputs of each expert's rows, where their mean stands in for it
    balanced_bias: Any = ()  # (L, E) bias that would balance the experts, times `real`; nothing where none is asked for


def sums_of(observed: PassResult, targets: Targets, real: Bool[Tensor, "*runs tokens"]) -> Sums:
    """Sums over tokens that the step's objectives and metrics need."""
    lm, trace = observed.lm, observed.trace
    of_tokens = trace.router_logits, observed.per_token_surprise, trace.expert_ids, trace.active
    tied = torch.zeros_like(targets.informative) if targets.tied is None else targets.tied
    taught = targets.expert, targets.informative, tied
    counted = ROUTING_SUMS(*of_tokens, *taught, real.expand(*trace.active.shape[:-3], -1))
    informative, hits, tied, visits, chance, routed, wanted, size, sized = counted
    return Sums(
        loss=lm.loss_sum,
        targets=lm.targets,
        correct=lm.correct,
        entropy=lm.entropy_sum,
        distill=observed.distill_sum,
        real=real.sum(dim=-1),
        visits=visits,
        informative=informative,
        hits=hits,
        chance=chance,
        tied=tied,
        routed=routed,
        wanted=wanted,
        surprise=size.sum(dim=(-2, -1)),
        surprised=sized.sum(dim=(-2, -1)),
        expert_surprise=size,
        expert_surprised=sized,
        nonfinite=observed.nonfinite,
        expert_outputs=observed.expert_outputs,
    )


def _routing_sums(
    logits: Tensor, surprise: Tensor, ids: Tensor, active: Tensor, target: Tensor, informative: Tensor, tied: Tensor,
    real: Tensor,
) -> Values:  # fmt: skip
    """(informative, hits, tied, visits, chance, routed, wanted, surprise, surprised)."""
    experts, all_tokens = logits.shape[-1], (-2, -1)
    hits = (logits.argmax(dim=-1) == target) & informative
    chance = torch.where(informative, 1 / active.sum(dim=-1).clamp_min(1).to(logits.dtype), 0.0)
    return (
        informative.sum(dim=all_tokens),
        hits.sum(dim=all_tokens),
        tied.sum(dim=all_tokens),
        count_visits(active, real),
        chance.sum(dim=all_tokens),
        routed_rows(ids, active, experts),
        counts(target, informative, experts),
        *finite_sum(surprise, dim=-2),
    )


def _routing_sums_kernel(*inputs: Tensor) -> Values:
    by_layer, chance, routed, wanted, surprise, surprised = step_kernels.routing_sums(*inputs)
    totals = by_layer.sum(dim=-1).unbind(0)
    return *totals, chance.sum(dim=-1), routed, wanted, surprise.to(torch.float32), surprised


ROUTING_SUMS = fused(
    reference=_routing_sums, kernel=_routing_sums_kernel,
    dims=(3, 3, 3, 3, 2, 2, 2, 1), out_dims=(0, 0, 0, 0, 0, 2, 2, 2, 2), floats=2,
)  # fmt: skip
