"""The decoder: embedding, layers of attention and experts, norm, head."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.attention import attention, causal_bias
from tiny_onn_func.checks import check_indices, check_mask
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.embedding import ngram_embedding, softcapped
from tiny_onn_func.experts import ApplyW2, ApplyW13, apply_w2, apply_w13
from tiny_onn_func.experts import apply_w13 as plain_apply_w13
from tiny_onn_func.hashing import hash_keys
from tiny_onn_func.moe import RouterTrace, RoutingInputs, moe
from tiny_onn_func.ops import embed, rms_norm, rotary_angles, wide_dtype
from tiny_onn_func.params import check_params
from tiny_onn_func.primitives.grouped import dense_matmul
from tiny_onn_func.routing import check_budget
from tiny_onn_func.tree import flatten, unflatten


def forward(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "*runs batch seq"],
    config: ModelConfig,
    *,
    attention_mask: Int[Tensor, "*runs batch seq"] | Bool[Tensor, "*runs batch seq"] | None = None,
    surprise_budget: int | float | Tensor = 0.5,
    apply_w2: ApplyW2 = apply_w2,
    apply_w13: ApplyW13 = apply_w13,
    router_coupling: int | float | Tensor = 0.0,
    explore: Int[Tensor, "*runs layers tokens"] | None = None,
    override: Int[Tensor, "*runs layers tokens"] | None = None,
) -> tuple[Float[Tensor, "*runs batch seq vocab"], RouterTrace]:
    """Logits and what the routers did.

    Several runs are one call under vmap, or with an axis of runs in front of everything, parameters and all: so the
    gradient of a mapped step is made, as it spares vmap's dispatch.

    Args:
        params: as made by `init_params`; a seam of gate and up may know where experts are that are not among them.
        input_ids: int64 in [0, vocab_size).
        attention_mask: int64 or bool, 1 = real token, 0 = padding; None = all real. Padding visits no expert and is
            never attended. Numbers 1, 2, ... keep several documents in a row apart: a token attends to its own only.
        surprise_budget: in (0, 1]; read when `config.num_experts_per_tok` is -1.
        apply_w2: what applies w2 to the rows; wrap it to look at, or to change, every expert's output.
        apply_w13: the same for gate and up.
        router_coupling: share of the gradient through the routing weights that is let through; 0 isolates the router.
        explore: expert that each (layer, token) also tries, -1 for none.
        override: expert that each (layer, token) visits alone, with weight 1; -1 for what the router says.

    Returns:
        logits in float32 (float64 for float64 parameters), and a RouterTrace stacked over layers, T = batch * seq.

    Raises:
        ValueError: the budget is outside (0, 1], there is no token, parameters are not the configuration's, or a tensor
            has another dtype or shape than said.
        IndexError: a token or an expert that there is not, or a negative number in the mask.
    """
    check_budget(surprise_budget)
    if input_ids.ndim < 2:
        raise ValueError(f"input_ids: expected (batch, seq) and axes of runs in front, got {tuple(input_ids.shape)}")
    runs, (batch, seq) = input_ids.shape[:-2], input_ids.shape[-2:]
    device = input_ids.device
    if not input_ids.numel():
        raise ValueError(f"input_ids: expected at least one token, got shape {tuple(input_ids.shape)}")
    check_params(params, config, runs, is_spread=apply_w13 is not plain_apply_w13)
    check_indices("input_ids", input_ids, 0, config.vocab_size)
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, input_ids.shape)
    for name, experts in (("explore", explore), ("override", override)):
        if experts is not None:
            shape = *runs, config.num_hidden_layers, batch * seq
            check_indices(name, experts, -1, config.num_experts, shape=shape)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rotary = rotary_angles(torch.arange(seq, device=device), config.head_dim, config.rope_theta)

    x = embed(input_ids, params["embed_tokens"])
    keys = hash_keys(input_ids, attention_mask, config.hash_key) if config.routing == "hash" else input_ids
    routing = RoutingInputs(
        rearrange(real != 0, "... b s -> ... (b s)"), surprise_budget, router_coupling, explore,
        rearrange(keys, "... b s -> ... (b s)"), override, rearrange(x, "... b s dim -> ... (b s) dim"),
    )  # fmt: skip
    if config.ngram_order > 1:
        x = x + ngram_embedding(params, input_ids, real, config)
    bias = causal_bias(attention_mask, seq, device, x.dtype)
    traces = []
    for index, layer in enumerate(unstack_layers(params["layers"], config.num_hidden_layers, len(runs))):
        normed = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
        values = embed(input_ids, layer["self_attn"]["value_embed"]) if config.value_embeddings else None
        x = x + attention(normed, layer["self_attn"], rotary, bias, config, values)
        if config.token_bias:
            x = x + embed(input_ids, layer["token_bias"])
        normed = rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
        tokens = rearrange(normed, "... b s dim -> ... (b s) dim")
        out, trace = moe(tokens, layer["moe"], index, routing, config, apply_w2, apply_w13)
        x = x + rearrange(out, "... (b s) dim -> ... b s dim", b=batch)
        traces.append(trace)
    head = params["embed_tokens"].mT if config.tie_word_embeddings else params["lm_head"]
    normed = rearrange(rms_norm(x, params["norm"], config.rms_norm_eps), "... b s dim -> ... (b s) dim")
    logits = rearrange(dense_matmul(normed, head), "... (b s) vocab -> ... b s vocab", b=batch)
    stacked = (torch.stack(same, dim=-3) for same in zip(*traces, strict=True))
    return softcapped(logits.to(wide_dtype(logits.dtype)), config), RouterTrace(*stacked)


def unstack_layers(layers: Mapping[str, Any], count: int, axis: int = 0) -> list[dict[str, Any]]:
    """Stacked layers -> one tree per layer, unbound once: indexing per layer makes the backward quadratic in L."""
    unbound = {name: leaf.unbind(axis) for name, leaf in flatten(layers).items()}
    return [unflatten({name: slices[index] for name, slices in unbound.items()}) for index in range(count)]
