"""Gate and up projections of each row, with gradients and a vmap rule of their own."""

from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels.runtime import is_traced
from tiny_onn_func.primitives.dispatch import dispatch_rows, undo_dispatch
from tiny_onn_func.primitives.function import PositionalFunction
from tiny_onn_func.primitives.grouped import GroupedMatmul, GroupedOuter, GroupedSum, matmul_kernel, sum_of
from tiny_onn_func.primitives.vmap import flatten_runs, outside_vmap, runs_first


def gate_and_up(
    x: Float[Tensor, "*runs tokens dim"],
    w1: Float[Tensor, "*runs experts dim inner"],
    w3: Float[Tensor, "*runs experts dim inner"],
    order: Int[Tensor, "*runs rows"],
    inverse: Int[Tensor, "*runs rows"],
    offsets: Int32[Tensor, "*runs experts"],
) -> tuple[Float[Tensor, "*runs rows inner"], Float[Tensor, "*runs rows inner"]]:
    """Two grouped matmuls of the rows x[order // slots], read from their tokens where a kernel can.

    Args:
        order, inverse: of the rows, as `sort_by_expert` gives them: what flows back is added up token by token.
    """
    token = order // (order.shape[-1] // x.shape[-2])
    gate, up = outside_vmap(_GateAndUp.apply, x, w1, w3, token, order, inverse, offsets)
    return gate, up


class _GateAndUp(PositionalFunction):
    @staticmethod
    def forward(
        x: Tensor, w1: Tensor, w3: Tensor, token: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not is_traced(offsets) and runtime.supports(x, w1, w3):
            plain = flatten_runs(x, 2), flatten_runs(token, 1)
            gate, up = (
                forward_kernels.token_matmul(*plain, flatten_runs(w, 3), flatten_runs(offsets, 1)) for w in (w1, w3)
            )
            return gate.view(*token.shape, -1), up.view(*token.shape, -1)
        rows = dispatch_rows(x, order, inverse, order.shape[-1] // x.shape[-2])
        return matmul_kernel(rows, w1, offsets), matmul_kernel(rows, w3, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w3, token, order, inverse, offsets = ctx.saved_tensors
        grad_x = grad_w1 = grad_w3 = None
        if ctx.needs_input_grad[0]:
            grad_rows = GroupedSum.apply(gate, w1.mT, up, w3.mT, offsets)
            grad_x = undo_dispatch(grad_rows, order, inverse, order.shape[-1] // x.shape[-2])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_w1, grad_w3 = _outer_products(x, gate, up, token, order, inverse, offsets)
        return grad_x, grad_w1, grad_w3, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, x_dot: Tensor | None, w1_dot: Tensor | None, w3_dot: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        x, w1, w3, _, order, inverse, offsets = ctx.saved_tensors
        slots = order.shape[-1] // x.shape[-2]
        rows = dispatch_rows(x, order, inverse, slots)
        rows_dot = None if x_dot is None else dispatch_rows(x_dot, order, inverse, slots)
        gate, up = (
            sum_of(
                None if rows_dot is None else GroupedMatmul.apply(rows_dot, w, offsets),
                GroupedMatmul.apply(rows, torch.zeros_like(w) if w_dot is None else w_dot, offsets),
            )
            for w, w_dot in ((w1, w1_dot), (w3, w3_dot))
        )
        return gate, up

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return _GateAndUp.apply(*runs_first(info.batch_size, in_dims, *inputs)), (0, 0)


def _outer_products(
    x: Tensor, gate: Tensor, up: Tensor, token: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of w1 and w3 from those of gate and up."""
    if runtime.usable_now(x, gate, up):
        plain = flatten_runs(x, 2), flatten_runs(token, 1)
        grads = (
            forward_kernels.token_outer(*plain, flatten_runs(grad, 2), flatten_runs(offsets, 1)) for grad in (gate, up)
        )
        grad_w1, grad_w3 = (t.view(*offsets.shape, *t.shape[2:]) for t in grads)
        return grad_w1, grad_w3
    rows = dispatch_rows(x, order, inverse, order.shape[-1] // x.shape[-2])
    return GroupedOuter.apply(rows, gate, offsets), GroupedOuter.apply(rows, up, offsets)
