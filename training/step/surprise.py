"""The kinds of surprise: what a token's visit to an expert costs, measured in the one backward pass.

| kind | value for (layer, token, expert) | ranking within a token |
|---|---|---|
| w2 | norm of the gradient that the token puts on w2 | weight * ||h||, whatever the loss is |
| unweighted | the same without the routing weight | ||h||; with `surprise_sign: -1` the largest activation norm |
| experts | norm of the gradient that the token puts on w1, w3 and w2 | depends on the loss, by its direction |
| input | norm of the gradient that comes back through the expert to its input | depends on the loss |
| benefit | <g, y>: slope of the loss in the routing weight, the lower the more helpful; signed | depends on the loss |
| oracle | the token's own loss, had it visited that expert alone (`training.step.oracle`); no gradient | is the loss |

`oracle` is known for every expert, but for a few sampled tokens a step only, and costs several steps: for small sizes.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.experts import Rows
from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import as_wide_as
from tiny_onn_func.primitives.vmap import flatten_runs, outside_vmap
from training.step.hyper_params import Number


def nonfinite_surprise(
    surprise: Float[Tensor, "*runs layers tokens experts"],
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
) -> Int[Tensor, "*runs"]:
    """How many routed (layer, token, expert) have a surprise that is NaN or infinite; those not routed have none."""
    routed = surprise.gather(-1, torch.where(active, expert_ids, 0))
    return (active & ~routed.isfinite()).sum(dim=(-3, -2, -1))


SurpriseKind = Literal["w2", "unweighted", "experts", "input", "benefit", "oracle"]
KINDS: tuple[SurpriseKind, ...] = get_args(SurpriseKind)
MEASURED = KINDS[:-1]  # by hooks in the backward pass
PER_WEIGHT = ("unweighted", "benefit")  # kinds whose recorded values carry the routing weight, to be divided by it


def outer_norm(
    x: Float[Tensor, "*runs rows in_dim"], grad: Float[Tensor, "*runs rows out_dim"]
) -> Float[Tensor, "*runs rows"]:
    """||x|| * ||g|| of every row, float32 or wider: the norm of its outer product, which is never made."""
    return row_norm(x) * row_norm(grad)


def row_norm(x: Float[Tensor, "*runs rows dim"]) -> Float[Tensor, "*runs rows"]:
    """Euclidean norm of every row, float32 or wider."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def row_dot(x: Float[Tensor, "*runs rows dim"], grad: Float[Tensor, "*runs rows dim"]) -> Float[Tensor, "*runs rows"]:
    """<x, g> of every row, float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * grad.to(wide)).sum(dim=-1)


def scatter_rows(
    surprise: Float[Tensor, "*runs rows"],
    token: Int[Tensor, "*runs rows"],
    expert: Int[Tensor, "*runs rows"],
    tokens: int,
    experts: int,
) -> Float[Tensor, "*runs tokens experts"]:
    """Rows' values at [token, expert], +inf elsewhere; inactive rows (expert = `experts`) fall into a spare column."""
    spare = experts + 1
    empty = surprise.new_full((*surprise.shape[:-1], tokens * spare), torch.inf)
    flat = empty.scatter(-1, token * spare + expert, surprise)
    return rearrange(flat, "... (tokens spare) -> ... tokens spare", spare=spare)[..., :experts]


def scatter_surprise(
    left: Float[Tensor, "*runs rows in_dim"],
    grad: Float[Tensor, "*runs rows out_dim"],
    rows: Rows,
    tokens: int,
    experts: int,
    *,
    is_signed: bool = False,
) -> Float[Tensor, "*runs tokens experts"]:
    """`scatter_rows` of each row's surprise, or with `is_signed` of its dot product; in one pass where a kernel can."""
    sizes = tokens, experts, is_signed
    return outside_vmap(lambda *given: (_surface(*given),), left, grad, rows.token, rows.expert, *sizes)[0]


def _surface(
    left: Tensor, grad: Tensor, token: Tensor, expert: Tensor, tokens: int, experts: int, is_signed: bool
) -> Tensor:
    if runtime.usable_now(left, grad):
        one_run = flatten_runs(left, 2), flatten_runs(grad, 2), flatten_runs(token, 1), flatten_runs(expert, 1)
        made = step_kernels.spread_surprise(*one_run, tokens, experts, is_signed=is_signed)
        return made.view(*left.shape[:-2], tokens, experts)
    measured = row_dot(left, grad) if is_signed else outer_norm(left, grad)
    return scatter_rows(measured, token, expert, tokens, experts)


def divide_by_weight(
    surprise: Float[Tensor, "*runs layers tokens experts"],
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    weights: Float[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
) -> Float[Tensor, "*runs layers tokens experts"]:
    """Each value divided by its routing weight; an expert whose weight underflowed keeps 0."""
    ones = torch.ones_like(surprise)
    used = torch.where(active & (weights > 0), weights, 1.0).to(surprise.dtype)
    return surprise / ones.scatter(-1, expert_ids, used)


def divide_by_expert_mean(
    surprise: Float[Tensor, "*runs layers tokens experts"], exponent: Number
) -> Float[Tensor, "*runs layers tokens experts"]:
    """Each value divided by (mean size of its expert's values in the batch) ** exponent; 1 compares like with like."""
    finite = surprise.isfinite()
    size = torch.where(finite, surprise.abs(), 0.0)
    mean = size.sum(dim=-2, keepdim=True) / finite.sum(dim=-2, keepdim=True).clamp_min(1)
    scale = torch.where(mean > 0, mean, 1.0) ** as_wide_as(mean, exponent)
    return torch.where(finite, surprise / scale, torch.inf)
