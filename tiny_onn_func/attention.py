"""Causal grouped-query attention with QK norm, as in Qwen3."""

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.attend import attend
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.folding import one_of_shared
from tiny_onn_func.grouped import matmul
from tiny_onn_func.heads import split_heads


def causal_bias(
    attention_mask: Tensor | None, seq: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "*runs #batch seq seq"]:
    """What is added to the score of query i and key j: 0 if j <= i and token j is real, else the dtype's minimum.

    A mask of numbers beyond 1 (packed rows) keeps documents apart: a token sees keys of its own number only. One mask
    of all runs makes one bias. Added, not filled in: an addition has no backward of its own and takes it without a copy
    for every run.
    """
    visible = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    if attention_mask is not None:
        mask = one_of_shared(attention_mask, 2)
        key, query = mask.unsqueeze(-2), mask.unsqueeze(-1)
        visible = visible & (key != 0) & ((key == query) | (query == 0))
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def attention(
    x: Float[Tensor, "*runs batch seq dim"],
    params: Mapping[str, Tensor],
    rotary: tuple[Tensor, Tensor],
    bias: Float[Tensor, "*#runs #batch seq seq"],
    config: ModelConfig,
) -> Float[Tensor, "*runs batch seq dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, every group of query heads sharing one key and value head.

    A query that sees no key at all (padding on the left) gets a finite value that nobody reads.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    runs, batch, dim = x.shape[:-3], x.shape[-3], config.head_dim
    tokens = rearrange(x, "... batch seq dim -> ... (batch seq) dim")
    qkv = matmul(tokens, torch.cat([params[name] for name in ("q_proj", "k_proj", "v_proj")], dim=-1))
    q_norm = params["q_norm"] / math.sqrt(config.head_dim)  # a few numbers to scale, where the scores are many
    each = ((q_norm, heads), (params["k_norm"], groups))
    norms = torch.cat([norm.unsqueeze(-2).expand(*runs, count, dim) for norm, count in each], dim=-2)
    by_head = rearrange(qkv, "... (batch seq) (heads dim) -> ... batch seq heads dim", batch=batch, dim=dim)
    q, k, v = split_heads(by_head, norms, rotary, config.rms_norm_eps)
    q = rearrange(q, "... (groups share) seq dim -> ... groups share seq dim", groups=groups)
    out = attend(q, k, v, bias)
    out = rearrange(out, "... batch seq groups share dim -> ... (batch seq) (groups share dim)")
    return rearrange(matmul(out, params["o_proj"]), "... (batch seq) dim -> ... batch seq dim", batch=batch)
