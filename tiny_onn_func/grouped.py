"""Rows times experts: the grouped matmul, dispatch and combine, with every custom gradient of this project.

Three rules hold for all of them. Rows behind the last offset belong to nobody: never computed, exact zeros forward and
backward. Each backward is written with these same functions, so second derivatives exist. Each has a vmap rule that
folds R runs into the groups: R runs of E experts are one call with R * E groups, never a loop.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.autograd import Function

from tiny_onn_func.tiles import is_traced, tiled_matmul, tiled_outer


def grouped_matmul(
    rows: Float[Tensor, "rows in_dim"],
    weights: Float[Tensor, "experts in_dim out_dim"],
    offsets: Int32[Tensor, " experts"],
) -> Float[Tensor, "rows out_dim"]:
    """out[n] = rows[n] @ weights[e] for offsets[e-1] <= n < offsets[e]; rows behind offsets[-1] give zeros."""
    return _GroupedMatmul.apply(rows, weights, offsets)


def grouped_outer(
    rows: Float[Tensor, "rows in_dim"], grads: Float[Tensor, "rows out_dim"], offsets: Int32[Tensor, " experts"]
) -> Float[Tensor, "experts in_dim out_dim"]:
    """out[e] = sum of rows[n]^T grads[n] over offsets[e-1] <= n < offsets[e]: the weight gradient of the matmul."""
    return _GroupedOuter.apply(rows, grads, offsets)


def dispatch_rows(
    x: Float[Tensor, "tokens dim"], order: Int[Tensor, " rows"], inverse: Int[Tensor, " rows"], slots: int
) -> Float[Tensor, "rows dim"]:
    """rows[n] = x[order[n] // slots]: a copy of its token for every row, in the order of the experts."""
    return _Dispatch.apply(x, order, inverse, slots)


def combine_rows(
    y: Float[Tensor, "rows dim"],
    weights: Float[Tensor, "tokens slots"],
    order: Int[Tensor, " rows"],
    inverse: Int[Tensor, " rows"],
) -> Float[Tensor, "tokens dim"]:
    """out[t] = sum over slots m of weights[t, m] * y[inverse[t * slots + m]]."""
    return _Combine.apply(y, weights, order, inverse)


class _GroupedMatmul(Function):
    @staticmethod
    def forward(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return _matmul_kernel(rows, weights, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, offsets = ctx.saved_tensors
        grad_rows = grouped_matmul(grad, weights.mT, offsets) if ctx.needs_input_grad[0] else None
        grad_weights = grouped_outer(rows, grad, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weights, None

    @staticmethod
    def jvp(ctx: Any, rows_dot: Tensor | None, weights_dot: Tensor | None, _: None) -> Tensor:
        rows, weights, offsets = ctx.saved_tensors
        return _sum_of(
            None if rows_dot is None else grouped_matmul(rows_dot, weights, offsets),
            None if weights_dot is None else grouped_matmul(rows, weights_dot, offsets),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, weights: Tensor, offsets: Tensor) -> Any:
        rows, weights, offsets = _batch_first(info.batch_size, in_dims, rows, weights, offsets)
        nobody = F.pad(weights, (0, 0, 0, 0, 0, 1))  # one more group a run, of zeros, takes its inactive rows
        out = grouped_matmul(_fold(rows), _fold(nobody), _fold_offsets(offsets, rows.shape[1]))
        behind = torch.arange(rows.shape[1], device=rows.device) >= offsets[:, -1:]
        return _unfold(out, info.batch_size).masked_fill(behind.unsqueeze(-1), 0), 0  # 0 times garbage may be nan


class _GroupedOuter(Function):
    @staticmethod
    def forward(rows: Tensor, grads: Tensor, offsets: Tensor) -> Tensor:
        return _outer_kernel(rows, grads, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, grads, offsets = ctx.saved_tensors
        grad_rows = grouped_matmul(grads, grad.mT, offsets) if ctx.needs_input_grad[0] else None
        grad_grads = grouped_matmul(rows, grad, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_grads, None

    @staticmethod
    def jvp(ctx: Any, rows_dot: Tensor | None, grads_dot: Tensor | None, _: None) -> Tensor:
        rows, grads, offsets = ctx.saved_tensors
        return _sum_of(
            None if rows_dot is None else grouped_outer(rows_dot, grads, offsets),
            None if grads_dot is None else grouped_outer(rows, grads_dot, offsets),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, grads: Tensor, offsets: Tensor) -> Any:
        rows, grads, offsets = _batch_first(info.batch_size, in_dims, rows, grads, offsets)
        out = grouped_outer(_fold(rows), _fold(grads), _fold_offsets(offsets, rows.shape[1]))
        return _unfold(out, info.batch_size)[:, :-1], 0


class _Dispatch(Function):
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
        ones = grad.new_ones(grad.shape[0] // ctx.slots, ctx.slots)
        return combine_rows(grad, ones, order, inverse), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_: None) -> Tensor:
        order, inverse = ctx.saved_tensors
        return dispatch_rows(x_dot, order, inverse, ctx.slots)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Any:
        x, order, inverse = _batch_first(info.batch_size, in_dims, x, order, inverse)
        rows = dispatch_rows(_fold(x), _fold_index(order), _fold_index(inverse), slots)
        return _unfold(rows, info.batch_size), 0


class _Combine(Function):
    @staticmethod
    def forward(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
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
        rows = dispatch_rows(grad, order, inverse, slots)
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
        return _sum_of(
            None if y_dot is None else combine_rows(y_dot, weights, order, inverse),
            None if weights_dot is None else combine_rows(y, weights_dot, order, inverse),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
    ) -> Any:
        y, weights, order, inverse = _batch_first(info.batch_size, in_dims, y, weights, order, inverse)
        out = combine_rows(_fold(y), _fold(weights), _fold_index(order), _fold_index(inverse))
        return _unfold(out, info.batch_size), 0


for function in (_GroupedMatmul, _GroupedOuter, _Dispatch, _Combine):
    # `apply` asks for the signature at every call; made once here, a small step is a tenth faster
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[union-attr]


def _matmul_kernel(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Plain tensors only: inside a Function's forward no transform is in sight."""
    if is_traced(offsets):
        return tiled_matmul(rows, weights, offsets)
    if _has_fast_path(rows, weights):
        out = F.grouped_mm(rows, weights, offs=offsets)
        out[int(offsets[-1]) :] = 0  # the library leaves these rows as it found the memory
        return out
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for start, end, weight in _groups(offsets, weights):
        torch.mm(rows[start:end], weight, out=out[start:end])
    return out


def _outer_kernel(rows: Tensor, grads: Tensor, offsets: Tensor) -> Tensor:
    if is_traced(offsets):
        return tiled_outer(rows, grads, offsets)
    rows = rows.contiguous()
    if _has_fast_path(rows.mT, grads):
        return F.grouped_mm(rows.mT, grads, offs=offsets)
    out = rows.new_zeros(offsets.shape[0], rows.shape[1], grads.shape[1])
    for start, end, block in _groups(offsets, out):
        torch.mm(rows[start:end].mT, grads[start:end], out=block)
    return out


def _has_fast_path(left: Tensor, right: Tensor) -> bool:
    """Whether the library's grouped matmul takes these: float32 or bfloat16, strides in multiples of 16 bytes."""
    fast = (torch.float32, torch.bfloat16) if left.device.type == "cpu" else (torch.bfloat16,)
    return left.dtype in fast and all(_is_aligned(t) for t in (left, right))


def _is_aligned(t: Tensor) -> bool:
    if t.numel() == 0 or 0 in t.stride():
        return False
    inner, outer = sorted(t.stride()[-2:])
    return inner == 1 and all(s * t.element_size() % 16 == 0 for s in (outer, *t.stride()[:-2]))


def _groups(offsets: Tensor, blocks: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, end, block) of every group that has rows."""
    start = 0
    for end, block in zip(offsets.tolist(), blocks.unbind(0), strict=True):
        if end > start:
            yield start, end, block
        start = end


def _sum_of(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        only = second if first is None else first
        assert only is not None, "a tangent is asked for only when an input has one"
        return only
    return first + second


def _batch_first(runs: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Every tensor with the mapped axis first; those that are not mapped are repeated without a copy."""
    return tuple(
        t.expand(runs, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=False)
    )


def _fold(t: Tensor) -> Tensor:
    return rearrange(t, "runs first ... -> (runs first) ...")


def _unfold(t: Tensor, runs: int) -> Tensor:
    return rearrange(t, "(runs first) ... -> runs first ...", runs=runs)


def _fold_index(index: Tensor) -> Tensor:
    """Indices into each run's rows -> indices into all rows."""
    runs, rows = index.shape
    return _fold(index + rearrange(torch.arange(runs, device=index.device) * rows, "runs -> runs 1"))


def _fold_offsets(offsets: Tensor, rows: int) -> Tensor:
    """(R, E) -> R * (E + 1): the additional group of a run ends with its last row."""
    starts = rearrange(torch.arange(offsets.shape[0], device=offsets.device, dtype=offsets.dtype), "runs -> runs 1")
    last = repeat(offsets.new_full((1,), rows), "1 -> runs 1", runs=offsets.shape[0])
    return _fold(torch.cat((offsets, last), dim=1) + starts * rows)
