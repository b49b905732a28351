"""A 32-bit hash in tensor arithmetic: pseudo-random numbers that map, repeat and need no generator."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD = 1 << 32
_MASK = WORD - 1


def mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants) in int64 arithmetic: each output bit depends on every input bit."""
    x = x.to(torch.int64) & _MASK  # products of narrower integers would overflow
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def hash_logits(
    token_ids: Int[Tensor, "*runs tokens"], layer: int, num_experts: int
) -> Float[Tensor, "*runs tokens experts"]:
    """A number in [0, 1) for each (layer, token id, expert), the same wherever the token stands, float32.

    A router with these logits is a hash of the token (Roller et al. 2021, arXiv 2106.04426): it learns nothing.
    """
    key = mix(mix(token_ids) + layer + 1)
    words = mix(key.unsqueeze(-1) + mix(torch.arange(num_experts, device=token_ids.device)))
    return words.to(torch.float32) / WORD  # rounded once: WORD is a power of two
