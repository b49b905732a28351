"""One mixture-of-experts layer: route, visit the experts, combine."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.experts import ApplyW2, ApplyW13, apply_experts, apply_w13
from tiny_onn_func.hashing import hash_logits
from tiny_onn_func.ops import embed, rms_norm, scale_gradient, swiglu, wide_dtype
from tiny_onn_func.primitives.grouped import dense_matmul
from tiny_onn_func.routing import Routing, gated, route, send_alone

LEAST_COUNT = 1e-12  # of a table: less is nothing


class RouterTrace(NamedTuple):
    """Input and decision of the router: (tokens, ...) for one layer, stacked to (layers, tokens, ...) by `forward`."""

    router_inputs: Float[Tensor, "*layers tokens dim"]  # detached
    router_logits: Float[Tensor, "*layers tokens experts"]
    expert_ids: Int[Tensor, "*layers tokens slots"]
    weights: Float[Tensor, "*layers tokens slots"]
    active: Bool[Tensor, "*layers tokens slots"]


class RoutingInputs(NamedTuple):
    """Inputs of every layer's routing beside its parameters."""

    real: Bool[Tensor, "*runs tokens"]
    surprise_budget: int | float | Tensor
    router_coupling: int | float | Tensor  # share of the main loss's gradient that reaches the router
    explore: Int[Tensor, "*runs layers tokens"] | None
    keys: Int[Tensor, "*runs tokens"] | None = None  # what a hash hashes; read by hash routing only
    override: Int[Tensor, "*runs layers tokens"] | None = None  # the expert that a token visits alone; -1: as routed
    embedded: Float[Tensor, "*runs tokens dim"] | None = None  # the tokens' embeddings; read by token routing only


def router_input(
    x: Float[Tensor, "*runs tokens dim"], embedded: Float[Tensor, "*runs tokens dim"] | None, config: ModelConfig
) -> Float[Tensor, "*runs tokens dim"]:
    """Input of the router: the token's hidden state, or its normed embedding where the token alone routes."""
    if config.routing != "token":
        return x
    assert embedded is not None, "whoever routes by the token gives its embedding"
    return rms_norm(embedded, None, config.rms_norm_eps)


class Scores(NamedTuple):
    """Logits that weigh the experts of a layer, those that choose them, and the bias of the choice."""

    logits: Float[Tensor, "*runs tokens experts"]
    choice: Float[Tensor, "*runs tokens experts"] | None  # None: `logits` choose, too
    bias: Float[Tensor, "*runs experts"] | None


def router_scores(
    features: Float[Tensor, "*runs tokens dim"],
    keys: Int[Tensor, "*runs tokens"] | None,
    params: Mapping[str, Tensor],
    layer: int,
    config: ModelConfig,
) -> Scores:
    """Scores of the experts, float32 or wider: a linear map of the input, a fixed hash of a key, or one of each.

    Args:
        params: the router's leaves of the layer.
    """
    router = params["router"]
    if config.routing == "kmeans":  # sqrt(D) times the cosine
        features = rms_norm(features, None, config.rms_norm_eps)
        router = F.normalize(router, dim=-2)
    logits = gated(linear_router_logits(features, router), config) if config.has_router(layer) else None
    if config.routing == "stable":
        assert logits is not None, "a layer whose choices are counted has a router"
        assert keys is not None, "whoever routes by a table gives the ids"
        return stable_scores(logits, embed(keys, params["token_table"].detach()), params)
    if not config.is_hashed(layer):
        assert logits is not None, "what has no router is hashed"
        return Scores(logits, None, params["router_bias"])
    assert keys is not None, "whoever routes by a hash gives the keys"
    if config.hash_key == "table":
        fixed = embed(keys, params["token_table"].detach())
    else:
        fixed = hash_logits(keys, layer, config.num_experts)
    fixed = fixed.to(wide_dtype(features.dtype))
    return Scores(fixed, None, None) if logits is None else Scores(logits, fixed, None)


def stable_scores(
    logits: Float[Tensor, "*runs tokens experts"],
    counts: Float[Tensor, "*runs tokens experts"],
    params: Mapping[str, Tensor],
) -> Scores:
    """The router chooses until its table is on; then the log share of each expert in the table does.

    A token that the table has never seen is chosen for by the router (StableMoE: Dai et al. 2022, arXiv 2204.08396).
    """
    total = counts.sum(dim=-1, keepdim=True)
    on = params["table_on"] > 0  # (*runs, 1)
    shares = (counts / total.clamp_min(LEAST_COUNT)).clamp_min(LEAST_COUNT).log()
    choice = torch.where(on.unsqueeze(-1) & (total > 0), shares.to(logits.dtype), logits.detach())
    return Scores(logits, choice, torch.where(on, 0.0, params["router_bias"]))


def linear_router_logits(
    features: Float[Tensor, "*layers tokens dim"], router: Float[Tensor, "*layers dim experts"]
) -> Float[Tensor, "*layers tokens experts"]:
    """features @ router in float32 or wider."""
    dtype = wide_dtype(features.dtype)
    return dense_matmul(features.to(dtype), router.to(dtype))


def weigh_all(
    logits: Float[Tensor, "*runs tokens experts"], routing: Routing, real: Bool[Tensor, "*#runs tokens"]
) -> tuple[Routing, Float[Tensor, "*runs tokens experts"]]:
    """The routing with softmax(logits) as weights, and the weights of the experts that are not visited.

    Their mean outputs stand in for them: out_t = sum_visited p_te y_te + sum_others p_te mean y_e, so that the main
    loss teaches the router about all experts (Default MoE: Panda et al. 2025, arXiv 2504.12463).
    """
    p = torch.where(real.unsqueeze(-1), logits.softmax(dim=-1), 0.0)
    visited = torch.zeros_like(p).scatter_add(-1, routing.expert_ids, routing.active.to(p.dtype)) > 0
    weights = torch.where(routing.active, p.gather(-1, routing.expert_ids), 0.0)
    return routing._replace(weights=weights), torch.where(visited, 0.0, p)


def shared_expert(
    x: Float[Tensor, "*runs tokens dim"], params: Mapping[str, Tensor]
) -> Float[Tensor, "*runs tokens dim"]:
    """Output of the expert that every token visits (DeepSeekMoE: Dai et al. 2024, arXiv 2401.06066)."""
    gate, up = (dense_matmul(x, params[name]) for name in ("shared_w1", "shared_w3"))
    return dense_matmul(swiglu(gate, up), params["shared_w2"])


def moe(
    x: Float[Tensor, "*runs tokens dim"],
    params: Mapping[str, Tensor],
    layer: int,
    inputs: RoutingInputs,
    config: ModelConfig,
    apply_w2: ApplyW2,
    apply_w13: ApplyW13 = apply_w13,
) -> tuple[Float[Tensor, "*runs tokens dim"], RouterTrace]:
    """Output of the layer and its trace. Without coupling the main loss has exactly no gradient in the router."""
    decoupled = isinstance(inputs.router_coupling, float | int) and inputs.router_coupling == 0
    features = router_input(x, inputs.embedded, config)
    features = features.detach() if decoupled else features
    scores = router_scores(features, inputs.keys, params, layer, config)
    explore = None if inputs.explore is None else inputs.explore.select(-2, layer)
    routing = route(
        scores.logits, inputs.real, config, inputs.surprise_budget, scores.bias, explore, scores.choice
    )  # fmt: skip
    absent = None
    if config.default_outputs:
        routing, absent = weigh_all(scores.logits, routing, inputs.real)
    if inputs.override is not None:
        alone = inputs.override.select(-2, layer)
        routing = send_alone(routing, alone, inputs.real)
        absent = None if absent is None else torch.where(alone.unsqueeze(-1) >= 0, 0.0, absent)
    routing = routing._replace(weights=scale_gradient(routing.weights, inputs.router_coupling))
    out = apply_experts(x, routing, params, layer, apply_w2, apply_w13, config.num_experts)
    if absent is not None:
        absent = scale_gradient(absent, inputs.router_coupling)
        out = out + (absent @ params["default_output"].detach().to(absent.dtype)).to(out.dtype)
    if config.shared_expert_intermediate_size:
        out = out + shared_expert(x, params)
    return out, RouterTrace(features.detach(), scores.logits, *routing)
