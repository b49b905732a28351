"""The fast parameters as two vectors, of which processes hold contiguous shares.

    dense    = all leaves but those of experts, one behind the other in the order of `param_specs`
    experts  = expert by expert, each (w1, w3, w2) of all layers

So the experts of a process, and every share of an optimizer's state, are ranges of one of two vectors, whatever the
number of processes.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.params import param_specs
from tiny_onn_func.tree import ROUTER_LEAVES, Tree, flatten, unflatten

EXPERT_LEAVES = ("layers.moe.w1", "layers.moe.w3", "layers.moe.w2")
EXPERT_SHARE = "layers.moe.share"  # name of a share of the experts' vector; for AdamW a leaf of experts


class Vectors(NamedTuple):
    """All fast parameters of a process, or their gradients, or a moment."""

    dense: Float[Tensor, " dense"]
    experts: Float[Tensor, " experts"]


def fast_shapes(config: ModelConfig, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of every fast leaf of a process with that many experts."""
    shapes = {name: spec.shape for name, spec in param_specs(config).items()}
    own = {name: (shape[0], num_experts, *shape[2:]) for name, shape in shapes.items() if name in EXPERT_LEAVES}
    return {name: own.get(name, shape) for name, shape in shapes.items() if name.split(".")[-1] not in ROUTER_LEAVES}


def to_vectors(fast: Mapping[str, Any], config: ModelConfig) -> Vectors:
    """The leaves of a fast tree as vectors."""
    flat = flatten(fast)
    dense = [flat[name].reshape(-1) for name in fast_shapes(config, 1) if name not in EXPERT_LEAVES]
    experts = [rearrange(flat[name], "layers experts a b -> experts (layers a b)") for name in EXPERT_LEAVES]
    return Vectors(torch.cat(dense), torch.cat(experts, dim=1).reshape(-1))


def from_vectors(vectors: Vectors, config: ModelConfig, num_experts: int) -> Tree:
    """The inverse of `to_vectors` for a process with that many experts."""
    shapes = fast_shapes(config, num_experts)
    own = {name: shape for name, shape in shapes.items() if name not in EXPERT_LEAVES}
    pieces = vectors.dense.split([math.prod(shape) for shape in own.values()])
    flat = {name: piece.reshape(shape) for (name, shape), piece in zip(own.items(), pieces, strict=True)}
    sizes = [math.prod(shapes[name]) // num_experts for name in EXPERT_LEAVES]
    parts = rearrange(vectors.experts, "(experts n) -> experts n", experts=num_experts).split(sizes, dim=1)
    for name, part in zip(EXPERT_LEAVES, parts, strict=True):
        layers, _, a, _ = shapes[name]
        flat[name] = rearrange(part, "experts (layers a b) -> layers experts a b", layers=layers, a=a).contiguous()
    return unflatten({name: flat[name] for name in shapes})


def share_of(length: int, parts: int, place: int) -> slice:
    """The range of a vector that part `place` of `parts` holds: equal ones, the last shorter; as `torch.chunk`."""
    each = -(-length // parts)
    return slice(min(place * each, length), min((place + 1) * each, length))


def padded(vector: Tensor, parts: int) -> Tensor:
    """With zeros at the end, so that all parts are of one length."""
    missing = -vector.shape[0] % parts
    return torch.cat((vector, vector.new_zeros(missing))) if missing else vector


def named_shares(shares: Vectors, start: int, config: ModelConfig) -> Tree:
    """Shares of both vectors as a tree for AdamW, which asks a leaf's name for its decay and rate.

    Args:
        start: place in the whole dense vector at which the dense share begins.
    """
    named, place, end = {}, 0, start + shares.dense.shape[0]
    for name, shape in fast_shapes(config, 1).items():
        if name in EXPERT_LEAVES:
            continue
        first, last = max(place, start), min(place + math.prod(shape), end)
        if first < last:
            named[name] = shares.dense[first - start : last - start]
        place += math.prod(shape)
    return unflatten(named | {EXPERT_SHARE: shares.experts})


def joined_shares(tree: Mapping[str, Any]) -> Vectors:
    """The inverse of `named_shares`."""
    flat = flatten(tree)
    experts = flat.pop(EXPERT_SHARE)
    return Vectors(torch.cat([*flat.values()]) if flat else experts[:0], experts)
