"""Token-keyed parameters beside the embedding: hashed n-grams, values of attention, a bias of each layer.

None of them has a product with a matrix: a row is looked up and added. They are off by default, and Qwen3-MoE has no
name for any of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.hashing import earlier_ids, mix
from tiny_onn_func.ops import embed


def ngram_embedding(
    params: Mapping[str, Any],
    input_ids: Int[Tensor, "*runs batch seq"],
    documents: Int[Tensor, "*runs batch seq"] | Bool[Tensor, "*runs batch seq"],
    config: ModelConfig,
) -> Float[Tensor, "*runs batch seq dim"]:
    """Sum over n = 2 ... `ngram_order` of the embedding of the n tokens that end at each place.

    An n-gram has the row hash(its tokens) mod `ngram_buckets` of the table of its order, so that rare ones may share a
    row (hash embeddings: Svenstrup et al. 2017, arXiv 1709.03933; of bytes: Pagnoni et al. 2024, arXiv 2412.09871).

    Args:
        documents: attention mask; tokens of another number than a token's own are not in its n-grams.
    """
    orders, buckets = config.ngram_order - 1, config.ngram_buckets
    first_rows = torch.arange(orders, device=input_ids.device) * buckets
    rows = ngram_rows(input_ids, documents, config) + first_rows
    return reduce(embed(rows, params["ngram_embed"].flatten(-3, -2)), "... orders dim -> ... dim", "sum")


def ngram_rows(
    input_ids: Int[Tensor, "*runs batch seq"],
    documents: Int[Tensor, "*runs batch seq"] | Bool[Tensor, "*runs batch seq"],
    config: ModelConfig,
) -> Int[Tensor, "*runs batch seq orders"]:
    """Row of the n-gram that ends at each place, in [0, `ngram_buckets`), for n = 2 ... `ngram_order`."""
    key, rows = mix(input_ids), []
    for back in range(1, config.ngram_order):
        key = mix(key + mix(earlier_ids(input_ids, documents, back) + back * config.vocab_size + 1))
        rows.append(key % config.ngram_buckets)
    return torch.stack(rows, dim=-1)


def softcapped(logits: Float[Tensor, "*batch vocab"], config: ModelConfig) -> Float[Tensor, "*batch vocab"]:
    """cap * tanh(logits / cap) (Gemma 2: Riviere et al. 2024, arXiv 2408.00118); a cap of 0 leaves them alone."""
    cap = config.logit_softcap
    return logits if cap == 0 else cap * torch.tanh(logits / cap)
