"""Leaves of the router that follow no gradient: a bias that balances, a table of choices, means by expert."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import as_scalar, as_wide_as
from training.step.hyper_params import HyperParams, Number, is_off
from training.step.sums import Sums


def with_router_sums(
    sums: Sums,
    trace: RouterTrace,
    token_ids: Int[Tensor, "*runs tokens"],
    real: Bool[Tensor, "*runs tokens"],
    bias: Float[Tensor, "*runs layers experts"],
    hyper: HyperParams,
    config: ModelConfig,
) -> Sums:
    """The sums with those that some rules need: the bias that would balance these tokens, visits by token id, inputs.

    Shards of a batch make the mean of their biases, each weighing as much as it has tokens.
    """
    if config.routing == "stable":
        sums = sums._replace(token_visits=token_visits(trace, token_ids, config))
    if config.routing == "kmeans":
        sums = sums._replace(router_inputs=inputs_by_expert(trace))
    if is_off(hyper.quantile_balance):
        return sums
    wanted = quantile_bias(trace, bias, real, hyper.quantile_k, config) * as_wide_as(bias, sums.real)
    return sums._replace(balanced_bias=wanted)


def moved_leaves(
    router: Mapping[str, Tensor], learned: Mapping[str, Tensor], sums: Sums, step: Tensor, hyper: HyperParams,
    config: ModelConfig, learning: Number,
) -> dict[str, Tensor]:  # fmt: skip
    """All new leaves of the router: those that a gradient moved, and those that follow the sums of a whole batch.

    Args:
        router: the leaves before the step.
        learned: those that a gradient moved, after it.
        learning: 1 while the router learns, 0 once it is frozen.
    """
    new = {**router, **learned}
    new["router_bias"] = balanced_bias(new["router_bias"], sums.routed, hyper.bias_speed * learning)
    if not is_off(hyper.quantile_balance):
        share = hyper.quantile_balance * learning
        new["router_bias"] = moved_bias(router["router_bias"], new["router_bias"], sums, share)
    if config.routing == "kmeans":
        new["router"] = moved_means(new["router"], sums.router_inputs, sums.routed, hyper.kmeans_rate * learning)
    if config.default_outputs:
        outputs, rate = sums.expert_outputs.mT, 1 - hyper.default_memory
        new["default_output"] = moved_means(new["default_output"].mT, outputs, sums.routed, rate).mT
    return new | counted(router, sums, step, hyper) if config.routing == "stable" else new


def balanced_bias(
    bias: Tensor, routed: Int[Tensor, "*runs layers experts"], speed: Number
) -> Float[Tensor, "*runs layers experts"]:
    """bias + speed * sign(mean rows - rows): over-used experts sink (loss-free balancing, arXiv 2408.15664).

    Integers are compared, so an expert with exactly its fair share keeps its bias.
    """
    above = (routed.sum(dim=-1, keepdim=True) - routed * routed.shape[-1]).sign()
    return bias + (as_wide_as(above, speed) * above).to(bias.dtype)


def quantile_bias(
    trace: RouterTrace, bias: Float[Tensor, "*runs layers experts"], real: Bool[Tensor, "*runs tokens"], k: Number,
    config: ModelConfig,
) -> Float[Tensor, "*runs layers experts"]:  # fmt: skip
    """The bias b_e that a share K / E of the real tokens needs less than: its quantile of cutoff_t - score_te.

    A token visits an expert iff score + bias is above its cutoff, the largest score + bias among the experts that it
    does not visit. So the bias is the K / E quantile over tokens, linear between them, of what each token asks for; its
    mean over experts is then taken off, as a common bias changes no ranking (Kimi K3, section 2.3.3; torchtitan #4577).
    Scores are the softmax, or the sigmoid with that gate. With thresholds scores are logits, the cutoff is 0, and the
    mean stays: b_e is minus the 1 - K / E quantile of the logits (expert threshold, arXiv 2603.11535).

    Args:
        k: experts of a token; 0 takes the mean number that these tokens visited.

    Returns:
        the bias in the router's dtype; 0 where every expert was visited, so that no token has a cutoff.
    """
    logits, experts = trace.router_logits.detach(), config.num_experts
    count = real.sum(dim=-1).to(logits.dtype)
    if config.routing == "thresholds":
        asked = -logits
    else:
        scores = logits.softmax(dim=-1) if config.gate == "softmax" else logits.exp()
        visits = torch.zeros_like(scores).scatter_add(-1, trace.expert_ids, trace.active.to(scores.dtype))
        left = torch.where(visits > 0, -torch.inf, scores + bias.to(scores.dtype).unsqueeze(-2))
        asked = left.amax(dim=-1, keepdim=True) - scores
    visited = trace.active.sum(dim=(-2, -1)).to(logits.dtype) / as_wide_as(bias, count)[..., 0].clamp_min(1)
    share = visited / experts
    if not is_off(k):
        wanted = as_wide_as(share, as_scalar(k, share.device, share.dtype))
        share = torch.where(wanted > 0, wanted / experts, share)
    asked = torch.where(real.unsqueeze(-2).unsqueeze(-1), asked, torch.inf).sort(dim=-2).values
    place = share.clamp(0, 1) * (as_wide_as(share, count) - 1).clamp_min(0)
    below = place.floor().clamp(0, asked.shape[-2] - 1)
    above = place.ceil().clamp(0, asked.shape[-2] - 1)
    low, high = (asked.gather(-2, _rows(at, experts)).squeeze(-2) for at in (below, above))
    quantile = torch.where(low.isfinite() & high.isfinite(), low + (place - below).unsqueeze(-1) * (high - low), 0.0)
    if config.routing != "thresholds":
        quantile = quantile - quantile.mean(dim=-1, keepdim=True)
    return quantile.to(bias.dtype)


def moved_bias(old: Tensor, otherwise: Tensor, sums: Sums, share: Number) -> Float[Tensor, "*runs layers experts"]:
    """old + share * (the balanced bias of the sums - old); `otherwise` in runs whose share is 0."""
    balanced = sums.balanced_bias / as_wide_as(old, sums.real).clamp_min(1)
    share = as_wide_as(old, as_scalar(share, old.device, old.dtype))
    moved = old + share * torch.where(as_wide_as(old, sums.real) > 0, balanced - old, 0.0)
    return torch.where(share > 0, moved, otherwise)


def token_visits(
    trace: RouterTrace, token_ids: Int[Tensor, "*runs tokens"], config: ModelConfig
) -> Float[Tensor, "*runs layers vocab experts"]:
    """Visits of this batch's tokens to each expert, by the token's id."""
    experts, vocab = config.num_experts, config.vocab_size
    place = (token_ids[..., None, :, None] * experts + trace.expert_ids).flatten(-2)
    empty = trace.weights.new_zeros((*place.shape[:-1], vocab * experts))
    visits = empty.scatter_add(-1, place, trace.active.to(empty.dtype).flatten(-2))
    return visits.unflatten(-1, (vocab, experts))


def counted(router: Mapping[str, Tensor], sums: Sums, step: Tensor, hyper: HyperParams) -> dict[str, Tensor]:
    """The table with this step's visits added to `table_memory` of its counts, until the step after which it chooses.

    The share of an expert in a token's counts is what a router that sees the token alone and is distilled from the
    choices by cross entropy would learn.
    """
    table, last = router["token_table"], as_scalar(hyper.table_step, step.device)
    is_on = (last > 0) & (step + 1 >= last)
    memory = as_wide_as(table, as_scalar(hyper.table_memory, table.device, table.dtype))
    added = memory * table + sums.token_visits.to(table.dtype)
    was_on = (router["table_on"] > 0).unsqueeze(-1)
    on = as_wide_as(router["table_on"], is_on) | (router["table_on"] > 0)
    return {"token_table": torch.where(was_on, table, added), "table_on": on.to(router["table_on"].dtype)}


def inputs_by_expert(trace: RouterTrace) -> Float[Tensor, "*runs layers dim experts"]:
    """The router's inputs of the tokens that visit each expert, added up."""
    visits = torch.zeros_like(trace.router_logits)
    visits = visits.scatter_add(-1, trace.expert_ids, trace.active.to(visits.dtype))
    return trace.router_inputs.to(visits.dtype).mT @ visits


def moved_means(
    means: Float[Tensor, "*runs layers dim experts"], sums: Tensor, rows: Int[Tensor, "*runs layers experts"],
    rate: Number,
) -> Float[Tensor, "*runs layers dim experts"]:  # fmt: skip
    """mean + rate * (the mean of these rows - mean) of each expert that has rows; the others keep theirs.

    Of the router's inputs this is an online k-means (Ahrac et al. 2026, arXiv 2605.12476), of the outputs it is what
    Default MoE (Panda et al. 2025, arXiv 2504.12463) keeps.
    """
    count = rows.unsqueeze(-2)
    share = as_wide_as(means, as_scalar(rate, means.device, means.dtype))
    return torch.where(count > 0, means + share * (sums.to(means.dtype) / count.clamp_min(1) - means), means)


def _rows(at: Tensor, experts: int) -> Tensor:
    """Row indices (..., layers) as an index of every expert's column."""
    return at.to(torch.int64)[..., None, None].expand(*at.shape, 1, experts)
