"""Kinds of surprise: the cost of a token's visit to an expert, measured in the one backward pass; one table entry each.

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

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.experts import Rows, input_of
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import as_wide_as
from tiny_onn_func.primitives.fused import Values, fused
from training.step.hyper_params import Number
from training.step.oracle import sampled_losses


def nonfinite_surprise(
    surprise: Float[Tensor, "*runs layers tokens experts"],
    expert_ids: Int[Tensor, "*runs layers tokens slots"],
    active: Bool[Tensor, "*runs layers tokens slots"],
) -> Int[Tensor, "*runs"]:
    """Number of routed (layer, token, expert) with a surprise of NaN or infinity; unrouted ones do not count."""
    routed = surprise.gather(-1, torch.where(active, expert_ids, 0))
    return (active & ~routed.isfinite()).sum(dim=(-3, -2, -1))


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
    return SCATTER(left, grad, rows.token, rows.expert, tokens, experts, is_signed)[0]


def _scatter_reference(
    left: Tensor, grad: Tensor, token: Tensor, expert: Tensor, tokens: int, experts: int, is_signed: bool
) -> Values:
    measured = row_dot(left, grad) if is_signed else outer_norm(left, grad)
    return (scatter_rows(measured, token, expert, tokens, experts),)


SCATTER = fused(
    reference=_scatter_reference,
    kernel=lambda *inputs: (step_kernels.spread_surprise(*inputs[:-1], is_signed=inputs[-1]),),
    dims=(2, 2, 1, 1), out_dims=(2,), floats=2,
)  # fmt: skip


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


# The table ------------------------------------------------------------------------------------------------------------


class HookPoint(NamedTuple):
    """Hook point in the backward pass of an expert, and the measure that is taken there.

    `place` is `output` (of w2), `gate_up` (both projections) or `input` (of each row). `measure` maps the saved tensor,
    the gradient at the place and the rows to a value of each row. `scatter` does the same and `scatter_rows` in one
    pass: (saved, grad, rows, tokens, experts) -> (tokens, experts).
    """

    place: Literal["output", "gate_up", "input"]
    saves: Literal["hidden", "output", "input"]
    measure: Callable[[Tensor, Tensor, Rows], Tensor]
    scatter: Callable[[Tensor, Tensor, Rows, int, int], Tensor] | None = None


class Kind(NamedTuple):
    """A kind of surprise.

    Args:
        points: where rows are measured; the values of several places add up as squares.
        divide_by_weight: whether what is measured carries the routing weight, to be divided out.
        losses: in place of hooks, values from extra forward passes, of one run:
            ((params, batch, hyper, step, explore), config) -> (L, T, E).
    """

    points: tuple[HookPoint, ...] = ()
    divide_by_weight: bool = False
    losses: Callable[[Any, Any], Tensor] | None = None


def _gate_up_norm(x: Tensor, grad: Tensor, rows: Rows) -> Tensor:
    return row_norm(x).gather(-1, input_of(x, rows)) * row_norm(grad)


W2 = HookPoint("output", "hidden", lambda hidden, grad, _: outer_norm(hidden, grad), scatter_surprise)
W13 = HookPoint("gate_up", "input", _gate_up_norm)
INPUT = HookPoint("input", "input", lambda _, grad, rows: row_norm(grad))
DOT = HookPoint(
    "output", "output", lambda y, grad, _: row_dot(y, grad),
    lambda y, grad, rows, tokens, experts: scatter_surprise(y, grad, rows, tokens, experts, is_signed=True),
)  # fmt: skip

SurpriseKind = Literal["w2", "unweighted", "experts", "input", "benefit", "oracle"]
SURPRISE_KINDS: Mapping[SurpriseKind, Kind] = {
    "w2": Kind((W2,)),
    "unweighted": Kind((W2,), divide_by_weight=True),
    "experts": Kind((W2, W13)),
    "input": Kind((INPUT,)),
    "benefit": Kind((DOT,), divide_by_weight=True),
    "oracle": Kind(losses=sampled_losses),
}
KINDS: tuple[SurpriseKind, ...] = get_args(SurpriseKind)
MEASURED = tuple(kind for kind in KINDS if SURPRISE_KINDS[kind].points)  # by hooks in the backward pass


def kind_of(name: SurpriseKind) -> Kind:
    """Look up a kind in the table.

    Raises:
        ValueError: no such kind.
    """
    if name not in SURPRISE_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(SURPRISE_KINDS)}, got {name!r}")
    return SURPRISE_KINDS[name]
