"""Counts of the tokens of a text, and the table by token that gives every expert an even share of them."""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.hashing import hash_logits
from training.data.corpus import Corpus
from training.data.streams import CHUNK


def token_counts(text: Corpus, vocab_size: int) -> npt.NDArray[np.int64]:
    """Occurrences of each token id, (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, text.tokens.size, CHUNK):
        counts += np.bincount(text.tokens[start : start + CHUNK], minlength=vocab_size)
    return counts


def balanced_table(counts: npt.NDArray[np.int64], config: ModelConfig) -> Float[Tensor, "layers vocab experts"]:
    """Scores by token with which K experts a token get even shares of a text with these token counts.

    Layer by layer, the most frequent token first, each takes the K experts with the least rows so far, of equal ones
    those that a hash of (layer, token) ranks first (balanced assignment of Hash Layers: Roller et al. 2021, arXiv
    2106.04426, section 3.2). The chosen have the score 1 + their hash's number, the others that number alone, so that
    weights are those of a hash; float32.

    Args:
        counts: (vocab,) occurrences of each token.

    Raises:
        ValueError: the configuration has no fixed K.
    """
    k = config.num_experts_per_tok
    if k < 1:
        raise ValueError(f"model.num_experts_per_tok: expected a fixed K with hash_key: table, got {k}")
    ids = torch.arange(config.vocab_size)
    table = torch.stack([hash_logits(ids, at, config.num_experts) for at in range(config.num_hidden_layers)])
    order = np.argsort(-counts, kind="stable")
    for scores in table:
        rows, hashed = np.zeros(config.num_experts, np.int64), scores.numpy()
        for token in order:
            chosen = np.lexsort((-hashed[token], rows))[:k]
            rows[chosen] += counts[token]
            hashed[token, chosen] += 1
    return table
