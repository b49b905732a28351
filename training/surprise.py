"""The kinds of surprise: what a token's visit to an expert costs, measured in the one backward pass.

| kind | value for (layer, token, expert) | ranking within a token |
|---|---|---|
| w2 | norm of the gradient that the token puts on w2 | weight * ||h||, whatever the loss is |
| unweighted | the same without the routing weight | ||h||; with `surprise_sign: -1` the largest activation norm |
| experts | norm of the gradient that the token puts on w1, w3 and w2 | depends on the loss, by its direction |
| input | norm of the gradient that comes back through the expert to its input | depends on the loss |
| benefit | <g, y>: slope of the loss in the routing weight, the lower the more helpful; signed | depends on the loss |
| oracle | the token's own loss, had it visited that expert alone (`training.oracle`); no gradient | is the loss |

`oracle` is known for every expert, but for a few sampled tokens a step only, and costs several steps: for small sizes.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.experts import Rows
from training.hyper import Number

SurpriseKind = Literal["w2", "unweighted", "experts", "input", "benefit", "oracle"]
KINDS: tuple[SurpriseKind, ...] = get_args(SurpriseKind)
MEASURED = KINDS[:-1]  # by hooks in the backward pass
PER_WEIGHT = ("unweighted", "benefit")  # kinds whose recorded values carry the routing weight, to be divided by it


def row_surprise(x: Float[Tensor, "rows in_dim"], grad: Float[Tensor, "rows out_dim"]) -> Float[Tensor, " rows"]:
    """||x|| * ||g|| of every row, float32 or wider: the norm of its outer product, which is never made."""
    return row_norm(x) * row_norm(grad)


def row_norm(x: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """Euclidean norm of every row, float32 or wider."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def row_dot(x: Float[Tensor, "rows dim"], grad: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """<x, g> of every row, float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * grad.to(wide)).sum(dim=-1)


def sparse_fill(
    surprise: Float[Tensor, " rows"], rows: Rows, tokens: int, experts: int
) -> Float[Tensor, "tokens experts"]:
    """Rows' values at [token, expert], +inf elsewhere; inactive rows (expert = `experts`) fall into a spare column."""
    spare = experts + 1
    flat = surprise.new_full((tokens * spare,), torch.inf).scatter(0, rows.token * spare + rows.expert, surprise)
    return rearrange(flat, "(tokens spare) -> tokens spare", spare=spare)[:, :experts]


def per_weight(
    surprise: Float[Tensor, "layers tokens experts"],
    expert_ids: Int[Tensor, "layers tokens slots"],
    weights: Float[Tensor, "layers tokens slots"],
    active: Bool[Tensor, "layers tokens slots"],
) -> Float[Tensor, "layers tokens experts"]:
    """Each value divided by its routing weight; an expert whose weight underflowed keeps 0."""
    ones = torch.ones_like(surprise)
    used = torch.where(active & (weights > 0), weights, 1.0).to(surprise.dtype)
    return surprise / ones.scatter(-1, expert_ids, used)


def beside_own_mean(
    surprise: Float[Tensor, "layers tokens experts"], exponent: Number
) -> Float[Tensor, "layers tokens experts"]:
    """Each value divided by (mean size of its expert's values in the batch) ** exponent; 1 compares like with like."""
    finite = surprise.isfinite()
    size = torch.where(finite, surprise.abs(), 0.0)
    mean = size.sum(dim=1, keepdim=True) / finite.sum(dim=1, keepdim=True).clamp_min(1)
    scale = torch.where(mean > 0, mean, 1.0) ** exponent
    return torch.where(finite, surprise / scale, torch.inf)
