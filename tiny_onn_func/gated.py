"""The gated half of an expert: gate and up of each row, and their activation, with gradients of their own."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd import Function

from tiny_onn_func import native
from tiny_onn_func.grouped import GroupedMatmul, GroupedOuter, GroupedSum, batch_first, matmul_kernel, sum_of
from tiny_onn_func.ops import swiglu


def gate_and_up(
    rows: Float[Tensor, "rows dim"],
    w1: Float[Tensor, "experts dim inner"],
    w3: Float[Tensor, "experts dim inner"],
    offsets: Int32[Tensor, " experts"],
) -> tuple[Float[Tensor, "rows inner"], Float[Tensor, "rows inner"]]:
    """Two grouped matmuls of the same rows, whose gradients in the rows are added where they are made."""
    return _GateAndUp.apply(rows, w1, w3, offsets)


def activate(gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up, forward and backward in one pass each where a kernel takes them."""
    return Activate.apply(gate, up) if native.can_take(gate, up) else swiglu(gate, up)


class _GateAndUp(Function):
    @staticmethod
    def forward(rows: Tensor, w1: Tensor, w3: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return matmul_kernel(rows, w1, offsets), matmul_kernel(rows, w3, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, w3, offsets = ctx.saved_tensors
        return (
            GroupedSum.apply(gate, w1.mT, up, w3.mT, offsets) if ctx.needs_input_grad[0] else None,
            GroupedOuter.apply(rows, gate, offsets) if ctx.needs_input_grad[1] else None,
            GroupedOuter.apply(rows, up, offsets) if ctx.needs_input_grad[2] else None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, rows_dot: Tensor | None, w1_dot: Tensor | None, w3_dot: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor]:
        rows, w1, w3, offsets = ctx.saved_tensors
        gate, up = (
            sum_of(
                None if rows_dot is None else GroupedMatmul.apply(rows_dot, w, offsets),
                GroupedMatmul.apply(rows, torch.zeros_like(w) if w_dot is None else w_dot, offsets),
            )
            for w, w_dot in ((w1, w1_dot), (w3, w3_dot))
        )
        return gate, up

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, w1: Tensor, w3: Tensor, offsets: Tensor) -> Any:
        return _GateAndUp.apply(*batch_first(info.batch_size, in_dims, rows, w1, w3, offsets)), (0, 0)


class Activate(Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return native.swiglu(gate, up) if native.may_run(gate, up) else swiglu(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if native.may_run(grad, gate, up):
            return native.swiglu_grad(grad, gate, up)
        return grad * up * _slope(gate), grad * F.silu(gate)

    @staticmethod
    def jvp(ctx: Any, gate_dot: Tensor | None, up_dot: Tensor | None) -> Tensor:
        gate, up = ctx.saved_tensors
        return sum_of(
            None if gate_dot is None else gate_dot * up * _slope(gate),
            None if up_dot is None else F.silu(gate) * up_dot,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], gate: Tensor, up: Tensor) -> Any:
        return Activate.apply(*batch_first(info.batch_size, in_dims, gate, up)), 0


for function in (_GateAndUp, Activate):
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[union-attr]  # see grouped.py


def _slope(gate: Tensor) -> Tensor:
    """Derivative of silu."""
    share = gate.sigmoid()
    return share * (1 + gate * (1 - share))
