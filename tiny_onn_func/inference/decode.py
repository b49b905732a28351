"""Incremental decoding: the computation of `forward`, with a key-value cache and few operations a token.

One token costs little arithmetic, so the time goes into the number of operations: weights are laid out once a text,
shapes are changed by `view` (einops asks what a pattern means at every call), no gradient is prepared for.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.attention import causal_bias
from tiny_onn_func.config import DYNAMIC_K, ModelConfig
from tiny_onn_func.decoder import unstack_layers
from tiny_onn_func.embedding import ngram_embedding, softcapped
from tiny_onn_func.hashing import NO_TOKEN, hash_keys, key_of
from tiny_onn_func.inference.arguments import check_memory, check_tokens
from tiny_onn_func.inference.expert_visits import visit_of
from tiny_onn_func.inference.kv_cache import append, empty_cache, view
from tiny_onn_func.inference.layer_weights import LayerWeights, lay_out, reads
from tiny_onn_func.moe import Scores, router_input, router_scores, weigh_all
from tiny_onn_func.ops import as_scalar, rotary_angles, swiglu_reference, wide_dtype
from tiny_onn_func.params import check_params
from tiny_onn_func.routing import Routing, route


class DecodeState(NamedTuple):
    """State of a batch that is being decoded: all that stays the same from token to token, and the cache."""

    config: ModelConfig
    embedding: Float[Tensor, "vocab dim"]
    ngrams: Mapping[str, Tensor]  # tables of n-grams, where the configuration has them
    layers: tuple[LayerWeights, ...]
    norm: Float[Tensor, " dim"]
    head: Float[Tensor, "dim vocab"]
    eps: Float[Tensor, ""]
    cos: Float[Tensor, "#batch columns 1 head_dim"]
    sin: Float[Tensor, "#batch columns 1 head_dim"]
    mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"] | None  # None where no row is padded
    hidden: Float[Tensor, "batch 1 1 columns"] | None  # what to add to the scores of every later query
    window: int  # how many of the last tokens are attended to, the token itself among them
    surprise_budget: float
    memory: tuple[tuple[Tensor, Tensor], ...]  # the cache, layer by layer
    columns: list[int]  # one number: how many of the cache's columns were read
    recent: list[Tensor]  # one (batch, before): the last tokens that were read, NO_TOKEN before the first


class DecodeOutput(NamedTuple):
    """Logits of the last token, and every layer's routing of the new tokens."""

    logits: Float[Tensor, "batch vocab"]  # of the last token
    routes: tuple[Routing, ...]  # one a layer, tokens = batch * new


@torch.inference_mode()
def start_decoding(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: int,
    columns: int,
    *,
    attention_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"] | None = None,
    context_length: int | None = None,
    surprise_budget: float = 0.5,
) -> DecodeState:
    """Build the state for decoding up to `columns` tokens a row; the prompt may be padded on the left.

    Raises:
        ValueError: parameters that are not the configuration's, padding elsewhere, or an argument out of range.
    """
    check_params(params, config)
    check_memory(batch, columns, attention_mask, context_length, surprise_budget)
    embedding = params["embed_tokens"]
    dtype, device = embedding.dtype, embedding.device
    layers = tuple(lay_out(layer) for layer in unstack_layers(params["layers"], config.num_hidden_layers))
    mask = None if attention_mask is None or (reads(device) and attention_mask.all()) else attention_mask
    positions, hidden = torch.arange(columns, device=device)[None], None
    if mask is not None:
        skipped = (mask == 0).sum(dim=1, keepdim=True)
        hidden = torch.zeros(len(mask), columns, dtype=dtype, device=device)
        hidden = hidden.masked_fill(positions < skipped, torch.finfo(dtype).min)[:, None, None]
        positions = (positions - skipped).clamp_min(0)
    cos, sin = (angle.to(dtype)[:, :, None] for angle in rotary_angles(positions, config.head_dim, config.rope_theta))
    cache = empty_cache(config, batch, columns, dtype, device)
    return DecodeState(
        config, embedding, {name: params[name] for name in ("ngram_embed",) if name in params}, layers, params["norm"],
        embedding.mT if config.tie_word_embeddings else params["lm_head"],
        as_scalar(config.rms_norm_eps, device, wide_dtype(dtype)),
        cos, sin, mask, hidden, context_length or columns, surprise_budget,
        tuple(zip(*(part.unbind(0) for part in cache), strict=True)), [0],
        [torch.full((batch, _look_back(config)), NO_TOKEN, device=device)],
    )  # fmt: skip


@torch.inference_mode()
def decode(state: DecodeState, tokens: Int[Tensor, "batch new"], start: int) -> DecodeOutput:
    """Read the tokens of the columns start, start + 1, ...: one of each row, or the whole prompt at column 0.

    The logits are those of `forward` on the whole text, up to rounding, as long as the window holds it.

    Raises:
        ValueError: tokens of another shape or dtype, or that do not begin behind what was read; 0 begins anew.
    """
    batch, columns = state.memory[0][0].shape[0], state.memory[0][0].shape[2]
    prompt = None if state.mask is None else state.mask.shape[1]
    check_tokens(tokens, start, state.columns[0], batch, columns, prompt)
    new = tokens.shape[1]
    state.columns[0] = start + new
    flat = tokens.reshape(-1)
    real = torch.ones_like(flat, dtype=torch.bool) if state.mask is None or start else state.mask.reshape(-1) != 0
    first = 0 if new > 1 else max(0, start + 1 - state.window)
    bias = (
        _prompt_bias(state, new) if new > 1 else None if state.hidden is None else state.hidden[..., first : start + 1]
    )
    read = _with_recent(state, tokens, real.view(batch, new), start)
    keys = _keys(state, tokens, read, start)
    x, routes = F.embedding(flat, state.embedding), []
    if state.config.ngram_order > 1:
        x = x + ngram_embedding(state.ngrams, read.clamp_min(0), read != NO_TOKEN, state.config)[:, -new:].flatten(0, 1)
    for index, layer in enumerate(state.layers):
        x = _attend(state, layer, index, x.view(batch, new, -1), flat, start, first, bias)
        x, routing = _visit_experts(state, layer, index, x, flat, keys, real)
        routes.append(routing)
    last = x.view(batch, new, -1)[:, -1]
    logits = _rms_norm(last, state.norm, state.eps) @ state.head
    return DecodeOutput(softcapped(logits.to(wide_dtype(logits.dtype)), state.config), tuple(routes))


def _look_back(config: ModelConfig) -> int:
    """Number of earlier tokens that n-grams or the key of a hash need."""
    return max(config.ngram_order - 1, int(config.hash_key in ("previous", "pair")))


def _with_recent(state: DecodeState, tokens: Tensor, real: Tensor, start: int) -> Int[Tensor, "batch before_and_new"]:
    """The last tokens and the new ones, NO_TOKEN on padding; the last ones of them are kept for the next call."""
    before = state.recent[0].shape[1]
    if not before:
        return tokens
    recent = state.recent[0] if start else torch.full_like(state.recent[0], NO_TOKEN)
    read = torch.cat((recent, torch.where(real, tokens, NO_TOKEN)), dim=1)
    state.recent[0] = read[:, -before:]
    return read


def _prompt_bias(state: DecodeState, new: int) -> Float[Tensor, "#batch 1 queries keys"]:
    """Causal, padding hidden, and no key further back than the window; a group's queries lie one below the other."""
    dtype, device = state.embedding.dtype, state.embedding.device
    bias = causal_bias(state.mask, new, device, dtype)
    place = torch.arange(new, device=device)
    bias = bias.masked_fill(place[:, None] - place >= state.window, torch.finfo(dtype).min)
    share = state.config.num_attention_heads // state.config.num_key_value_heads
    return bias.repeat_interleave(share, dim=1)[:, None]


def _attend(
    state: DecodeState,
    layer: LayerWeights,
    index: int,
    x: Tensor,
    ids: Tensor,
    start: int,
    first: int,
    bias: Tensor | None,
) -> Float[Tensor, "tokens dim"]:
    """x + attention(norm(x)), as in attention.py; the heads of a group are queries of one key head."""
    config, (batch, new, width) = state.config, x.shape
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = x.view(-1, width)
    qkv = (_rms_norm(x, layer.input_norm, state.eps) @ layer.qkv).view(batch, new, -1, head_dim)
    v = qkv[:, :, heads + groups :]
    if layer.value_embed is not None:
        v = v + F.embedding(ids, layer.value_embed).view(v.shape)
    qk = _rms_norm(qkv[:, :, : heads + groups], layer.qk_norm, state.eps)
    span = slice(start, start + new)
    qk = torch.addcmul(qk * state.cos[:, span], qk.roll(head_dim // 2, -1), state.sin[:, span])
    append(state.memory[index], start, qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2))
    keys, values = view(state.memory[index], first, start + new)
    q = qk[:, :, :heads].view(batch, new, groups, -1, head_dim).transpose(1, 2).reshape(batch, groups, -1, head_dim)
    if new == 1 and batch > 2:  # one query a row: two products take half the time of the library's kernel
        scores = torch.matmul(q * head_dim**-0.5, keys.mT)
        out = torch.matmul((scores if bias is None else scores + bias).softmax(dim=-1), values)
    else:
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    out = out.view(batch, groups, new, -1).transpose(1, 2).reshape(batch * new, -1)
    x = torch.addmm(x, out, layer.o_proj)
    return x if layer.token_bias is None else x + F.embedding(ids, layer.token_bias)


def _visit_experts(
    state: DecodeState, layer: LayerWeights, index: int, x: Tensor, token_ids: Tensor, keys: Tensor, real: Tensor
) -> tuple[Float[Tensor, "tokens dim"], Routing]:
    """x + moe(norm(x)), as in moe.py."""
    config = state.config
    normed = _rms_norm(x, layer.post_norm, state.eps)
    embedded = F.embedding(token_ids, state.embedding) if config.routing == "token" else None
    features = router_input(normed, embedded, config)
    scores = router_scores(features, keys, layer.router, index, config)
    routing, absent = _route(scores, real, state), None
    if config.default_outputs:
        routing, absent = weigh_all(scores.logits, routing, real)
    out = visit_of(routing, layer)(x, normed, routing, layer)
    if absent is not None:
        out = out + (absent @ layer.router["default_output"].to(absent.dtype)).to(out.dtype)
    if layer.shared is not None:
        gate, up = (normed @ layer.shared[0]).chunk(2, dim=-1)
        out = torch.addmm(out, swiglu_reference(gate, up), layer.shared[1])
    return out, routing


def _keys(state: DecodeState, tokens: Int[Tensor, "batch new"], read: Tensor, start: int) -> Int[Tensor, " tokens"]:
    """`hash_keys` of the new tokens, (batch * new,): a prompt's from itself, one token's from what was read before."""
    kind = state.config.hash_key
    if kind in ("token", "table"):
        return tokens.reshape(-1)
    if not start:
        return hash_keys(tokens, state.mask, kind).reshape(-1)
    skipped = 0 if state.mask is None else (state.mask == 0).sum(dim=1)
    token = tokens[:, -1]
    return key_of(kind, token, read[:, -2:][:, 0], torch.full_like(token, start) - skipped)


def _route(scores: Scores, real: Bool[Tensor, " tokens"], state: DecodeState) -> Routing:
    """`route`, without the slots that no token fills."""
    routing = route(scores.logits, real, state.config, state.surprise_budget, scores.bias, choice=scores.choice)
    if not reads(scores.logits.device) or (state.config.num_experts_per_tok != DYNAMIC_K and state.mask is None):
        return routing
    used = max(1, int(routing.active.sum(dim=-1).max()))  # kept slots come first
    return Routing(*(part[:, :used] for part in routing))


def _rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """`ops.rms_norm` from the norm, which is one operation: half the time of the library's on a single token."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
    scale = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt()
    return (x * scale * weight).to(x.dtype)
