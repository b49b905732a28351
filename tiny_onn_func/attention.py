"""Causal grouped-query attention with QK norm, as in Qwen3."""

import math
from collections.abc import Mapping

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.ops import rms_norm, rotate


def causal_bias(
    attention_mask: Tensor | None, seq: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "#batch seq seq"]:
    """What is added to the score of query i and key j: 0 if j <= i and token j is real, else the dtype's minimum.

    A mask of numbers beyond 1 (packed rows) keeps documents apart: a token sees keys of its own number only.
    Added, not filled in: an addition has no backward of its own and takes the mask without a copy for every run.
    """
    visible = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    if attention_mask is not None:
        key, query = (rearrange(attention_mask, f"batch seq -> batch {axes}") for axes in ("1 seq", "seq 1"))
        visible = visible & (key != 0) & ((key == query) | (query == 0))
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def attention(
    x: Float[Tensor, "batch seq dim"],
    params: Mapping[str, Tensor],
    rotary: tuple[Tensor, Tensor],
    bias: Float[Tensor, "#batch seq seq"],
    config: ModelConfig,
) -> Float[Tensor, "batch seq dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, every group of query heads sharing one key and value head.

    A query that sees no key at all (padding on the left) gets a finite value that nobody reads.
    """
    heads, eps = dict(dim=config.head_dim), config.rms_norm_eps
    split = "batch seq (heads dim) -> batch heads seq dim"
    q = rms_norm(rearrange(x @ params["q_proj"], split, **heads), params["q_norm"], eps)
    k = rms_norm(rearrange(x @ params["k_proj"], split, **heads), params["k_norm"], eps)
    v = rearrange(x @ params["v_proj"], split, **heads)
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    q = rearrange(q, "batch (groups share) seq dim -> batch groups share seq dim", groups=config.num_key_value_heads)
    scores = einsum(q / math.sqrt(config.head_dim), k, "b groups share i dim, b groups j dim -> b groups share i j")
    weights = (scores + rearrange(bias, "batch i j -> batch 1 1 i j")).softmax(dim=-1)
    out = einsum(weights, v, "b groups share i j, b groups j dim -> b i groups share dim")
    return rearrange(out, "batch seq groups share dim -> batch seq (groups share dim)") @ params["o_proj"]
