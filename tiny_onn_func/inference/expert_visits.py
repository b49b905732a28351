"""The experts' outputs in decoding: the fastest of four ways for this number of tokens on this device."""

from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.inference.layer_weights import LayerWeights, reads
from tiny_onn_func.ops import swiglu_reference
from tiny_onn_func.primitives.grouped import grouped_matmul
from tiny_onn_func.routing import Routing

Visit = Callable[[Tensor, Tensor, Routing, LayerWeights], Tensor]  # (x, normed, routing, layer) -> x + moe(normed)


def visit_of(routing: Routing, layer: LayerWeights) -> Visit:
    """Choose the fastest expert implementation for this number of tokens on this device."""
    tokens, slots = routing.expert_ids.shape
    if not reads(layer.w2.device):
        return _visit_gathered if tokens * slots <= layer.w2.shape[0] else _visit_sorted
    if tokens == 1:
        return _visit_one_by_one
    return _visit_all if _are_few(tokens, slots, layer) else _visit_sorted


def _visit_gathered(x: Tensor, normed: Tensor, routing: Routing, layer: LayerWeights) -> Float[Tensor, "tokens dim"]:
    """Few (token, slot) pairs: their experts' matrices are gathered, and no index is read on the host."""
    ids = routing.expert_ids
    gate, up = einsum(normed, layer.w13[ids], "t dim, t slot dim both -> t slot both").chunk(2, dim=-1)
    hidden = swiglu_reference(gate, up) * routing.weights.to(x.dtype).unsqueeze(-1)
    y = einsum(hidden, layer.w2[ids], "t slot inner, t slot inner dim -> t slot dim")
    return x + torch.where(routing.active.unsqueeze(-1), y, 0.0).sum(dim=1)


def _visit_one_by_one(x: Tensor, normed: Tensor, routing: Routing, layer: LayerWeights) -> Float[Tensor, "1 dim"]:
    """One token: its experts' matrices are used where they lie."""
    visited = [layer.each[expert] for expert in routing.expert_ids[0].tolist()]
    gate, up = torch.cat([normed @ w13 for w13, _ in visited]).chunk(2, dim=-1)
    hidden = swiglu_reference(gate, up) * routing.weights.to(x.dtype).mT
    for row, (_, w2) in zip(hidden.split(1), visited, strict=True):
        x = torch.addmm(x, row, w2)
    return x


def _are_few(tokens: int, slots: int, layer: LayerWeights) -> bool:
    """True if two batched products over every token and expert beat many small ones over the routed pairs.

    Not with a weight that is nan or infinite: 0 times it is nan, and only tokens that visit that expert may see it.

    Measured on two cores: from about 400,000 multiplications an expert, or 200,000 times K / E a pair, they are not.
    """
    experts, inner, width = layer.w2.shape
    size = 3 * inner * width
    return layer.finite and tokens * size <= 400_000 and size * experts <= 200_000 * slots


def _visit_all(x: Tensor, normed: Tensor, routing: Routing, layer: LayerWeights) -> Float[Tensor, "tokens dim"]:
    """A few tokens that visit most experts between them: every expert reads every token, weight 0 where not routed."""
    experts, tokens = layer.w2.shape[0], x.shape[0]
    weights = routing.weights.new_zeros(tokens, experts).scatter_add_(1, routing.expert_ids, routing.weights)
    gate, up = torch.bmm(normed.expand(experts, -1, -1), layer.w13).chunk(2, dim=-1)
    hidden = swiglu_reference(gate, up) * weights.to(x.dtype).mT[:, :, None]
    return x + torch.bmm(hidden, layer.w2).sum(dim=0)


def _visit_sorted(x: Tensor, normed: Tensor, routing: Routing, layer: LayerWeights) -> Float[Tensor, "tokens dim"]:
    """Many tokens: their (token, slot) pairs sorted by expert, free slots last, as in experts.py."""
    experts, slots = layer.w2.shape[0], routing.expert_ids.shape[1]
    expert, order = routing.expert_ids.masked_fill(~routing.active, experts).flatten().sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).to(torch.int32)
    rows = normed.index_select(0, order // slots)
    gate, up = grouped_matmul(rows, layer.w13, offsets).chunk(2, dim=-1)
    weights = routing.weights.to(x.dtype).flatten().index_select(0, order)[:, None]
    y = grouped_matmul(swiglu_reference(gate, up) * weights, layer.w2, offsets)
    return x + torch.empty_like(y).index_copy_(0, order, y).view(-1, slots, x.shape[1]).sum(dim=1)
