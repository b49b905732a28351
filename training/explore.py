"""Which tokens try a random expert: a pure function of (seed, step), so that it maps, repeats and resumes."""

import torch
from jaxtyping import Int
from torch import Tensor

from training.hyper import Number

_MASK = (1 << 32) - 1


def draw_exploration(
    seed: Number, step: Tensor, probability: Number, layers: int, tokens: int, experts: int
) -> Int[Tensor, "layers tokens"]:
    """An expert to try for each (layer, token), -1 for none; each token tries with the given probability.

    Counter based: word = hash(hash(seed, step), position). Random number generators do not run under vmap, this does.
    """
    position = torch.arange(2 * layers * tokens, device=step.device).reshape(2, layers, tokens)
    key = _mix(_mix(torch.as_tensor(seed, device=step.device).to(torch.int64)) + step)
    word = _mix(_mix(position) + key)
    tries = word[0].to(torch.float64) / (_MASK + 1) < probability
    return torch.where(tries, word[1] * experts >> 32, -1)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants) in int64 arithmetic: each output bit depends on every input bit."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
