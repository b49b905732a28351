"""Agreement of the kinds of surprise: all kinds from one backward pass, and their rank agreement within tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.experts import apply_w2, apply_w13
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.tree import Tree
from training.step.batch import Batch, without_padding_labels
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import Number
from training.step.losses import language_modelling
from training.step.main_pass import gradients
from training.step.surprise import MEASURED, SURPRISE_KINDS, SurpriseKind, divide_by_weight

RECORDED = {SURPRISE_KINDS[kind].points: kind for kind in MEASURED}  # where rows are measured -> a kind that does
VALUES = (*MEASURED, "weight")  # what `all_surprises` gives, the lower the better


def recorded_surprises(
    params: Mapping[str, Any],
    batch: Batch,
    config: ModelConfig,
    surprise_budget: Number,
    kinds: Sequence[SurpriseKind],
) -> tuple[list[Float[Tensor, "layers tokens experts"]], RouterTrace]:
    """Measure by each kind's hooks every routed (layer, token, expert), +inf elsewhere; with the routers' trace.

    One forward and one backward pass: each kind's hooks are wrapped around those of the one before.
    """
    shape = config.num_hidden_layers, batch.input_ids.numel(), config.num_experts

    def objective(embedding: Tree, inputs: Any) -> tuple[Tensor, tuple[list[Tensor], RouterTrace]]:
        params, batch, surprise_budget = inputs
        batch = without_padding_labels(batch)
        leaf, w2, w13, surfaces = embedding["embed_tokens"], apply_w2, apply_w13, []
        for kind in kinds:
            surfaces.append(
                leaf.new_full((*batch.input_ids.shape[:-2], *shape), torch.inf, dtype=wide_dtype(leaf.dtype))
            )
            hooks = SurpriseHookManager(surfaces[-1], w2, kind, w13)
            w2, w13 = hooks.apply_w2, hooks.apply_w13
        logits, trace = forward(
            {**params, **embedding}, batch.input_ids, config, attention_mask=batch.attention_mask,
            surprise_budget=surprise_budget, apply_w2=w2, apply_w13=w13,
        )  # fmt: skip
        return language_modelling(logits, batch.labels).loss_sum, (surfaces, trace)

    # A path from the bottom to the loss is all that the hooks need; no other parameter gets a gradient.
    _, (surfaces, trace) = gradients(
        objective, ({"embed_tokens": params["embed_tokens"]},), (dict(params), batch, surprise_budget)
    )
    return surfaces, trace


def all_surprises(
    params: Mapping[str, Any], batch: Batch, config: ModelConfig, surprise_budget: Number
) -> tuple[Float[Tensor, "values layers tokens experts"], RouterTrace]:
    """Every value of VALUES for every routed (layer, token, expert), +inf elsewhere, and the routers' trace.

    `weight` is the routing weight: the lowest one is what w2 would point at if all ||h|| were equal.
    """
    surfaces, trace = recorded_surprises(params, batch, config, surprise_budget, [*RECORDED.values()])
    recorded, values = dict(zip(RECORDED, surfaces, strict=True)), []
    for kind in MEASURED:
        entry = SURPRISE_KINDS[kind]
        value = recorded[entry.points]
        if entry.divide_by_weight:
            value = divide_by_weight(value, trace.expert_ids, trace.weights, trace.active)
        values.append(value)
    weights = torch.where(trace.active, trace.weights, torch.inf).to(surfaces[0].dtype)
    values.append(torch.full_like(surfaces[0], torch.inf).scatter(-1, trace.expert_ids, weights))
    return torch.stack(values), trace


class Agreement(NamedTuple):
    """Rank agreement of each pair of values, as means over tokens; NaN where no token has both rankings.

    A token counts for a pair if both rankings are known there and neither is a single tie.
    """

    tau: Float[Tensor, "values values"]  # Kendall's tau-b
    top1: Float[Tensor, "values values"]  # share of tokens whose lowest expert is the same
    chance: Float[Tensor, "values values"]  # what top1 would be for a random expert of the token's own: mean 1 / K
    tokens: Float[Tensor, "values values"]


def rank_agreement(
    values: Float[Tensor, "values layers tokens slots"], active: Bool[Tensor, "layers tokens slots"]
) -> Agreement:
    """Rank agreement of the values over the experts that a token visits, for tokens that visit two or more.

    tau-b = sum_{i<j} sign(a_i - a_j) sign(b_i - b_j) / sqrt(untied pairs of a * untied pairs of b) (Kendall 1945).

    A ranking is known at a token iff all its active slots are finite.
    """
    sums = [_sums(values[:, layer], active[layer]) for layer in range(active.shape[0])]
    tau, top1, chance, tokens = (torch.stack(part).sum(dim=0) for part in zip(*sums, strict=True))
    count = torch.where(tokens > 0, tokens, torch.nan)
    return Agreement(tau / count, top1 / count, chance / count, tokens)


def _sums(values: Float[Tensor, "values tokens slots"], active: Bool[Tensor, "tokens slots"]) -> tuple[Tensor, ...]:
    known = (values.isfinite() | ~active).all(dim=-1)
    filled = torch.where(active & known.unsqueeze(-1), values, 0.0)
    pairs = active.unsqueeze(-1) & active.unsqueeze(-2)
    signs = torch.where(pairs, (filled.unsqueeze(-1) - filled.unsqueeze(-2)).sign(), 0.0)
    signs = rearrange(signs, "values tokens i j -> tokens values (i j)").to(torch.float32)
    concordant = signs @ signs.mT  # tokens, values, values; every pair counted twice, above and below
    untied = concordant.diagonal(dim1=-2, dim2=-1)
    counted = ((untied > 0) & known.mT).to(torch.float64)
    both = einsum(counted, counted, "tokens a, tokens b -> tokens a b")
    tau = concordant / (untied.unsqueeze(-1) * untied.unsqueeze(-2)).sqrt().clamp_min(1)
    lowest = torch.where(active, filled, torch.inf).argmin(dim=-1)
    same = lowest.unsqueeze(0) == lowest.unsqueeze(1)
    share = 1 / active.sum(dim=-1).clamp_min(1).to(torch.float64)
    return (
        (tau * both).sum(dim=0),
        (rearrange(same, "a b tokens -> tokens a b") * both).sum(dim=0),
        (rearrange(share, "tokens -> tokens 1 1") * both).sum(dim=0),
        both.sum(dim=0),
    )
