"""Counter-based random numbers: a pure function of (seed, step) runs under vmap and resumes, a generator does not."""

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.hashing import WORD, mix
from tiny_onn_func.ops import as_scalar, as_wide_as
from tiny_onn_func.tree import number_dtype
from training.step.hyper_params import Number


class Purpose(IntEnum):
    """Purpose of a draw; streams of one seed and step have nothing in common."""

    EXPLORE = 0
    SHUFFLE = 1
    REGENERATE = 2
    ORACLE = 3


def random_words(seed: Number, step: Tensor, stream: Purpose, *shape: int) -> Int[Tensor, "..."]:
    """Words of 32 bits: hash(hash(seed, step, stream), position); seed and step may have an axis of runs."""
    position = torch.arange(math.prod(shape), device=step.device).reshape(shape)
    key = mix(mix(as_scalar(seed, step.device).to(torch.int64)) + step)
    key = key if stream == Purpose.EXPLORE else mix(key + int(stream))
    return mix(mix(position) + key[(..., *(None,) * len(shape))])


def random_exploration(
    seed: Number, step: Tensor, probability: Number, layers: int, tokens: int, experts: int
) -> Int[Tensor, "*runs layers tokens"]:
    """An expert to try for each (layer, token), -1 for none; each token tries with the given probability."""
    word = random_words(seed, step, Purpose.EXPLORE, 2, layers, tokens)
    chance, choice = word.unbind(-3)
    tries = chance.to(number_dtype(chance.device)) / WORD < as_wide_as(chance, probability)
    return torch.where(tries, choice * experts >> 32, -1)


def random_normal(seed: Number, step: Tensor, stream: Purpose, *shape: int) -> Float[Tensor, "..."]:
    """Standard normal numbers of `number_dtype` (Box and Muller 1958)."""
    word = (random_words(seed, step, stream, 2, *shape).to(number_dtype(step.device)) + 0.5) / WORD
    size, turn = word.unbind(-1 - len(shape))
    return (-2 * size.log()).sqrt() * (2 * math.pi * turn).cos()
