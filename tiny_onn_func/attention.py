"""Causal grouped-query attention with QK norm, as in Qwen3."""

import math
from collections.abc import Mapping

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.ops import rms_norm, rotate


def causal_mask(attention_mask: Tensor | None, seq: int, device: torch.device) -> Bool[Tensor, "#batch seq seq"]:
    """True where query i may see key j: j <= i and token j is real."""
    causal = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    return causal if attention_mask is None else causal & rearrange(attention_mask != 0, "batch seq -> batch 1 seq")


def attention(
    x: Float[Tensor, "batch seq dim"],
    params: Mapping[str, Tensor],
    rotary: tuple[Tensor, Tensor],
    visible: Bool[Tensor, "#batch seq seq"],
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
    scores = einsum(q, k, "b groups share i dim, b groups j dim -> b groups share i j") / math.sqrt(config.head_dim)
    hidden = ~rearrange(visible, "batch i j -> batch 1 1 i j")
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
    out = einsum(weights, v, "b groups share i j, b groups j dim -> b i groups share dim")
    return rearrange(out, "batch seq groups share dim -> batch seq (groups share dim)") @ params["o_proj"]
