"""Tokens to rows, rows to experts, experts back to tokens. `apply_w2` is the seam where others may look in."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int32
from torch import Tensor

from tiny_onn_func.checks import check_shape
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.ops import swiglu
from tiny_onn_func.primitives.dispatch import combine_rows, dispatch_rows
from tiny_onn_func.primitives.fused import Values, fused
from tiny_onn_func.primitives.gate_up import gate_and_up
from tiny_onn_func.primitives.grouped import grouped_matmul
from tiny_onn_func.routing import Routing


class Rows(NamedTuple):
    """The N = tokens * slots rows of one layer, sorted by expert, inactive rows last."""

    token: Int[Tensor, "*runs rows"]  # original token index
    expert: Int[Tensor, "*runs rows"]  # E on inactive rows
    offsets: Int32[Tensor, "*runs experts"]  # row behind the last one of each expert
    order: Int[Tensor, "*runs rows"]  # the permutation that made them: flat (input, slot) index of each row
    inverse: Int[Tensor, "*runs rows"]  # undoes it


ApplyW2 = Callable[[int, Tensor, Tensor, Rows], Tensor]
ApplyW13 = Callable[[int, Tensor, Tensor, Tensor, Rows], tuple[Tensor, Tensor]]


def apply_w2(
    layer: int, hidden: Float[Tensor, "*runs rows inner"], w2: Float[Tensor, "*runs experts inner dim"], rows: Rows
) -> Float[Tensor, "*runs rows dim"]:
    """y = h w2 of each row's expert; zero on inactive rows. Anyone may pass a function of this form instead."""
    return grouped_matmul(hidden, w2, rows.offsets)


def apply_w13(
    layer: int,
    x: Float[Tensor, "*runs tokens dim"],
    w1: Float[Tensor, "*runs experts dim inner"],
    w3: Float[Tensor, "*runs experts dim inner"],
    rows: Rows,
) -> tuple[Float[Tensor, "*runs rows inner"], Float[Tensor, "*runs rows inner"]]:
    """Gate and up of each row's token and expert; the second seam, before the activation."""
    return gate_and_up(x, w1, w3, rows.order, rows.inverse, rows.offsets)


def spread(x: Float[Tensor, "*runs tokens dim"], rows: Rows) -> tuple[Float[Tensor, "*runs rows dim"], Rows]:
    """A copy of its token for every row, and the rows with these as inputs: for seams that look at a row's input."""
    copies = dispatch_rows(x, rows.order, rows.inverse, rows.order.shape[-1] // x.shape[-2])
    number = torch.arange(copies.shape[-2], device=x.device).expand_as(rows.order)
    return copies, rows._replace(order=number, inverse=number)


def input_of(x: Float[Tensor, "*runs inputs dim"], rows: Rows) -> Int[Tensor, "*runs rows"]:
    """Index of each row's input."""
    return rows.order // (rows.order.shape[-1] // x.shape[-2])


def sort_by_expert(routing: Routing, num_experts: int) -> Rows:
    """Sort the (token, slot) pairs by expert, stably, inactive ones last, with static shapes."""
    detached = routing.weights.detach()  # says by its dtype and device whether the kernel may run
    order, inverse, expert, offsets = SORT_ROWS(detached, routing.expert_ids, routing.active, num_experts)
    return Rows(order // routing.expert_ids.shape[-1], expert, offsets, order, inverse)


def _sort_rows(weights: Tensor, expert_ids: Tensor, active: Tensor, num_experts: int) -> Values:
    """(order, inverse, expert, offsets)."""
    expert = torch.where(active, expert_ids, num_experts)
    expert, order = rearrange(expert, "... tokens slots -> ... (tokens slots)").sort(stable=True)
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    inverse = torch.zeros_like(order).scatter(-1, order, positions)
    counts = order.new_zeros((*order.shape[:-1], num_experts + 1)).scatter_add(-1, expert, torch.ones_like(expert))
    return order, inverse, expert, counts[..., :num_experts].cumsum(dim=-1).to(torch.int32)


SORT_ROWS = fused(
    reference=_sort_rows,
    kernel=lambda _, expert_ids, active, num_experts: forward_kernels.sort_rows(expert_ids, active, num_experts),
)


def apply_experts(
    x: Float[Tensor, "*runs tokens dim"],
    routing: Routing,
    params: Mapping[str, Tensor],
    layer: int,
    apply_w2: ApplyW2,
    apply_w13: ApplyW13 = apply_w13,
    num_experts: int | None = None,
) -> Float[Tensor, "*runs tokens dim"]:
    """out_t = sum_e weight_te * (silu(x_t w1_e) * (x_t w3_e)) w2_e over the experts that token t visits.

    Args:
        num_experts: of the layer, where `params` holds some of them only and the seams know where the others are.
    """
    rows = sort_by_expert(routing, num_experts or params["w1"].shape[-3])
    gate, up = apply_w13(layer, x, params["w1"], params["w3"], rows)
    check_shape("apply_w13: up", up, gate.shape)  # how many rows they have is between the two hook points
    y = apply_w2(layer, swiglu(gate, up), params["w2"], rows)
    check_shape("apply_w2: output", y, (*rows.token.shape, x.shape[-1]))
    return combine_rows(y, routing.weights.to(y.dtype), rows.order, rows.inverse)
