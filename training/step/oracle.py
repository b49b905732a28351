"""The counterfactual oracle: what a token's own loss would be, had it visited one expert alone in one layer.

    loss[l, t, e] = -log p(next token of t), when token t visits expert e alone (weight 1) in layer l

Everything else is as routed: all other tokens, the layers below, and the layers above, whose routers see what becomes
of the token. It is exact. A token's own loss depends on nothing that comes after it, so a change at position t needs no
copy of the sequence: in the layers above, its *fork* is one more column that attends to the columns before t and to
itself, and that nobody attends to. One forward pass carries the forks of all experts, sampled tokens and layers.

Cost: P sampled tokens a layer and sequence make P * E * L columns beside the S of the sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.attention import attention
from tiny_onn_func.checks import check_indices, check_mask
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import unstack_layers
from tiny_onn_func.embedding import ngram_embedding, softcapped
from tiny_onn_func.experts import apply_experts, apply_w2
from tiny_onn_func.hashing import hash_keys
from tiny_onn_func.moe import RoutingInputs, moe, shared_expert
from tiny_onn_func.ops import embed, rms_norm, rotary_angles, wide_dtype
from tiny_onn_func.params import check_params
from tiny_onn_func.routing import Routing, check_budget
from training.step.batch import IGNORE_INDEX, Batch
from training.step.counter_rng import Purpose, random_words
from training.step.hyper_params import HyperParams, Number

PICKS = 2  # sampled tokens of a layer and sequence in a training step


def counterfactual_losses(
    params: Mapping[str, Any],
    batch: Batch,
    config: ModelConfig,
    sample: Int[Tensor, "layers batch picks"],
    *,
    surprise_budget: Number = 0.5,
    explore: Int[Tensor, "layers tokens"] | None = None,
) -> Float[Tensor, "layers batch picks experts"]:
    """Nats that each sampled token's own target costs by way of each expert alone; +inf where it has no target.

    Args:
        sample: positions in the sequence, for every layer its own; `draw_sample` makes some.
        explore: as in the step: the expert that a token visits besides its own, or -1; not where it is sent alone.

    Raises:
        ValueError, IndexError: what `forward` and `cross_entropy` refuse, and positions that there are not.
    """
    shape, layers = batch.input_ids.shape, config.num_hidden_layers
    check_budget(surprise_budget)
    check_params(params, config)
    check_indices("input_ids", batch.input_ids, 0, config.vocab_size)
    check_indices("labels", batch.labels, 0, config.vocab_size, shape=shape, ignore=IGNORE_INDEX)
    check_mask("attention_mask", batch.attention_mask, shape)
    check_indices("sample", sample, 0, shape[1], shape=(layers, shape[0], sample.shape[-1]))
    if explore is not None:
        check_indices("explore", explore, -1, config.num_experts, shape=(layers, shape.numel()))
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)
    seq, keys = positions.shape[1], hash_keys(batch.input_ids, batch.attention_mask, config.hash_key)
    x = F.embedding(batch.input_ids, params["embed_tokens"])
    if config.ngram_order > 1:
        x = x + ngram_embedding(params, batch.input_ids, batch.attention_mask, config)
    for index, layer in enumerate(unstack_layers(params["layers"], config.num_hidden_layers)):
        documents = batch.attention_mask.gather(1, positions)
        rotary = rotary_angles(positions, config.head_dim, config.rope_theta)
        normed = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
        token_ids = batch.input_ids.gather(1, positions)
        values = embed(token_ids, layer["self_attn"]["value_embed"]) if config.value_embeddings else None
        bias = _fork_bias(positions, documents, seq, x.dtype)
        x = x + attention(normed, layer["self_attn"], rotary, bias, config, values)
        if config.token_bias:
            x = x + embed(token_ids, layer["token_bias"])
        normed = rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
        forked = repeat(sample[index], "batch picks -> batch (picks experts)", experts=config.num_experts)
        forks = _columns(x, forked) + _each_alone(_columns(normed, forked), layer["moe"], index, config)
        explored = None if explore is None else _explored(explore, positions, seq)
        ids = token_ids.flatten()
        embedded, own_keys = F.embedding(ids, params["embed_tokens"]), keys.gather(1, positions).flatten()
        inputs = RoutingInputs((documents != 0).flatten(), surprise_budget, 0.0, explored, own_keys, embedded=embedded)
        out, _ = moe(rearrange(normed, "b s dim -> (b s) dim"), layer["moe"], index, inputs, config, apply_w2)
        x = torch.cat((x + rearrange(out, "(b s) dim -> b s dim", b=x.shape[0]), forks), dim=1)
        positions = torch.cat((positions, forked), dim=1)
    head = params["embed_tokens"].mT if config.tie_word_embeddings else params["lm_head"]
    logits = rms_norm(x[:, seq:], params["norm"], config.rms_norm_eps) @ head
    labels = batch.labels.gather(1, positions[:, seq:])
    log_p = softcapped(logits.to(wide_dtype(logits.dtype)), config).log_softmax(dim=-1)
    picked = -log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(labels == IGNORE_INDEX, torch.inf, picked)
    layers, _, picks = sample.shape
    return rearrange(losses, "b (layers picks e) -> layers b picks e", layers=layers, picks=picks)


def draw_sample(
    labels: Int[Tensor, "batch seq"], layers: int, picks: int, seed: Number, step: Tensor
) -> Int[Tensor, "layers batch picks"]:
    """Positions with a target, without repetition, drawn by (seed, step) for each layer and sequence.

    A sequence with fewer targets than picks fills up with positions that have none.
    """
    words = random_words(seed, step, Purpose.ORACLE, layers, *labels.shape)
    last = 1 << 33  # behind all words
    return torch.where(labels == IGNORE_INDEX, words + last, words).argsort(dim=-1)[..., :picks]


def sampled_losses(
    of_run: tuple[Mapping[str, Any], Batch, HyperParams, Tensor, Tensor | None], config: ModelConfig
) -> Float[Tensor, "layers tokens experts"]:
    """The losses of PICKS tokens a layer and sequence, drawn by (seed, step), as a surprise; +inf at all others."""
    params, batch, hyper, step, explore = of_run
    sample = draw_sample(batch.labels, config.num_hidden_layers, PICKS, hyper.explore_seed, step)
    with torch.no_grad():
        losses = counterfactual_losses(params, batch, config, sample, surprise_budget=hyper.pi_alpha, explore=explore)
    return fill_sampled(losses.detach(), sample, batch.labels.shape[1])


def fill_sampled(
    values: Float[Tensor, "layers batch picks experts"], sample: Int[Tensor, "layers batch picks"], seq: int
) -> Float[Tensor, "layers tokens experts"]:
    """The values at their tokens, +inf at those that were not sampled: the form of `per_token_surprise`."""
    layers, batch, _, experts = values.shape
    index = repeat(sample, "layers batch picks -> layers batch picks experts", experts=experts)
    dense = values.new_full((layers, batch, seq, experts), torch.inf).scatter(2, index, values)
    return rearrange(dense, "layers batch seq experts -> layers (batch seq) experts")


def regret(losses: Float[Tensor, "*sampled experts"], choice: Int[Tensor, "*sampled"]) -> Float[Tensor, "*sampled"]:
    """Nats lost by sending the token to `choice` alone instead of to the oracle's expert, argmin_e loss; 0 or more."""
    return losses.gather(-1, choice.unsqueeze(-1)).squeeze(-1) - losses.amin(dim=-1)


def _fork_bias(
    positions: Int[Tensor, "batch columns"], documents: Int[Tensor, "batch columns"], seq: int, dtype: torch.dtype
) -> Float[Tensor, "batch columns columns"]:
    """Added to scores: a column sees itself and the sequence's columns before its position, in its own document."""
    key, query = positions.unsqueeze(1), positions.unsqueeze(2)
    column = torch.arange(positions.shape[1], device=positions.device)
    visible = ((key < query) & (column < seq)) | (column == column.unsqueeze(1))
    document, own = documents.unsqueeze(1), documents.unsqueeze(2)
    visible = visible & (document != 0) & ((document == own) | (own == 0))
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _explored(
    explore: Int[Tensor, "layers tokens"], positions: Int[Tensor, "batch columns"], seq: int
) -> Int[Tensor, "layers columns_of_batch"]:
    """Exploration of every column: that of the token at its position."""
    by_row = rearrange(explore, "layers (batch seq) -> layers batch seq", seq=seq)
    return by_row.gather(-1, positions.expand(by_row.shape[0], -1, -1)).flatten(1)


def _columns(x: Float[Tensor, "batch columns dim"], index: Int[Tensor, "batch forks"]) -> Tensor:
    return x.gather(1, repeat(index, "batch forks -> batch forks dim", dim=x.shape[-1]))


def _each_alone(x: Tensor, params: Mapping[str, Tensor], layer: int, config: ModelConfig) -> Tensor:
    """Column i goes to expert i mod E alone."""
    tokens = rearrange(x, "batch forks dim -> (batch forks) dim")
    expert = (torch.arange(tokens.shape[0], device=x.device) % config.num_experts).unsqueeze(1)
    weights = torch.ones_like(expert, dtype=wide_dtype(x.dtype))
    routing = Routing(expert, weights, torch.ones_like(expert, dtype=torch.bool))
    out = apply_experts(tokens, routing, params, layer, apply_w2)
    if config.shared_expert_intermediate_size:
        out = out + shared_expert(tokens, params)
    return rearrange(out, "(batch forks) dim -> batch forks dim", batch=x.shape[0])
