"""Key-value cache of attention: memory for a whole text, allocated once and filled from left to right."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of every layer. Columns are places in the text, the same ones for every row of a batch."""

    keys: Float[Tensor, "layers batch groups columns dim"]  # rotated
    values: Float[Tensor, "layers batch groups columns dim"]


def empty_cache(
    config: ModelConfig, batch: int, columns: int, dtype: torch.dtype, device: torch.device | None = None
) -> KVCache:
    """Allocate zeros for `columns` tokens a row: unwritten entries are finite, so a mask can hide them."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, columns, config.head_dim)
    return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in KVCache._fields))


def append(
    memory: tuple[Tensor, Tensor],
    start: int,
    keys: Float[Tensor, "batch groups new dim"],
    values: Float[Tensor, "batch groups new dim"],
) -> None:
    """Write the columns start, start + 1, ... of a layer, in place; every other function here is pure."""
    for columns, new in zip(memory, (keys, values), strict=True):
        columns.narrow(2, start, new.shape[2]).copy_(new)


def view(memory: tuple[Tensor, Tensor], first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's columns first to end - 1, without a copy."""
    keys, values = memory
    return keys.narrow(2, first, end - first), values.narrow(2, first, end - first)
