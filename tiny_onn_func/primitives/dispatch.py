"""Tokens to the rows of their experts and back: gather and weighted sum, with gradients and vmap rules of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels import runtime
from tiny_onn_func.primitives.function import PositionalFunction
from tiny_onn_func.primitives.grouped import sum_of
from tiny_onn_func.primitives.vmap import flatten_runs, fold, outside_vmap, runs_first


def dispatch_rows(
    x: Float[Tensor, "*runs tokens dim"],
    order: Int[Tensor, "*runs rows"],
    inverse: Int[Tensor, "*runs rows"],
    slots: int,
) -> Float[Tensor, "*runs rows dim"]:
    """rows[n] = x[order[n] // slots]: a copy of its token for every row, in the order of the experts."""
    return outside_vmap(lambda *plain: (_dispatch(*plain),), x, order, inverse, slots)[0]


def combine_rows(
    y: Float[Tensor, "*runs rows dim"],
    weights: Float[Tensor, "*runs tokens slots"],
    order: Int[Tensor, "*runs rows"],
    inverse: Int[Tensor, "*runs rows"],
) -> Float[Tensor, "*runs tokens dim"]:
    """out[t] = sum over slots m of weights[t, m] * y[inverse[t * slots + m]]."""
    return outside_vmap(lambda *plain: (_combine(*plain),), y, weights, order, inverse)[0]


def undo_dispatch(
    rows: Float[Tensor, "*runs rows dim"],
    order: Int[Tensor, "*runs rows"],
    inverse: Int[Tensor, "*runs rows"],
    slots: int,
) -> Float[Tensor, "*runs tokens dim"]:
    """Sum the rows of each token: the backward pass of `dispatch_rows`."""
    return combine_rows(rows, rows.new_ones(*order.shape[:-1], order.shape[-1] // slots, slots), order, inverse)


def _dispatch(x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
    """Dispatch the rows of one run, or of several whose axes are in front, in one call."""
    if x.ndim == 2:
        return _Dispatch.apply(x, order, inverse, slots)
    rows = _Dispatch.apply(x.flatten(0, -2), _fold_index(order), _fold_index(inverse), slots)
    return rows.view(*order.shape, -1)


def _combine(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if y.ndim == 2:
        return _Combine.apply(y, weights, order, inverse)
    out = _Combine.apply(y.flatten(0, -2), weights.flatten(0, -2), _fold_index(order), _fold_index(inverse))
    return out.view(*weights.shape[:-1], -1)


class _Dispatch(PositionalFunction):
    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
        return x.index_select(0, order // slots)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, order, inverse, ctx.slots = inputs
        ctx.save_for_backward(order, inverse)
        ctx.save_for_forward(order, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        return undo_dispatch(grad, order, inverse, ctx.slots), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_: None) -> Tensor:
        order, inverse = ctx.saved_tensors
        return dispatch_rows(x_dot, order, inverse, ctx.slots)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Any:
        x, order, inverse = runs_first(info.batch_size, in_dims, x, order, inverse)
        return _dispatch(x, order, inverse, slots), 0


class _Combine(PositionalFunction):
    @staticmethod
    def forward(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        if runtime.usable_now(y, weights):
            return forward_kernels.combined_rows(y, weights, inverse)
        bags = rearrange(inverse, "(tokens slots) -> tokens slots", slots=weights.shape[-1])
        return F.embedding_bag(bags, y, per_sample_weights=weights, mode="sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, weights, order, inverse = ctx.saved_tensors
        slots = weights.shape[-1]
        if not ctx.needs_input_grad[1] and runtime.usable_now(grad, weights):
            return forward_kernels.scaled_rows(grad, weights, order), None, None, None
        rows = _Dispatch.apply(grad, order, inverse, slots)
        grad_weights = grad_y = None
        if ctx.needs_input_grad[1]:
            dots = reduce(y * rows, "rows dim -> rows", "sum").index_select(0, inverse)
            grad_weights = rearrange(dots, "(tokens slots) -> tokens slots", slots=slots)
        if ctx.needs_input_grad[0]:
            grad_y = rows * rearrange(weights, "tokens slots -> (tokens slots) 1").index_select(0, order)
        return grad_y, grad_weights, None, None

    @staticmethod
    def jvp(ctx: Any, y_dot: Tensor | None, weights_dot: Tensor | None, *_: None) -> Tensor:
        y, weights, order, inverse = ctx.saved_tensors
        return sum_of(
            None if y_dot is None else combine_rows(y_dot, weights, order, inverse),
            None if weights_dot is None else combine_rows(y, weights_dot, order, inverse),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
    ) -> Any:
        return _combine(*runs_first(info.batch_size, in_dims, y, weights, order, inverse)), 0


def _fold_index(index: Tensor) -> Tensor:
    """Indices into each run's rows -> indices into all rows."""
    index = flatten_runs(index, 1)
    runs, rows = index.shape
    return fold(index + rearrange(torch.arange(runs, device=index.device) * rows, "runs -> runs 1"))
