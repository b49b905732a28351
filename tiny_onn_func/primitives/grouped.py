"""Rows times experts: the grouped matmul and its outer product, the primitives of experts.py.

Three rules hold for all of them. Rows behind the last offset belong to nobody: never computed, exact zeros forward and
backward. Each backward is written with these same functions, so second derivatives exist. Each has a vmap rule: R runs
of E experts are one call of a kernel with R * E groups, never a loop.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int32
from torch import Tensor

from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels.runtime import is_traced
from tiny_onn_func.primitives.function import PositionalFunction
from tiny_onn_func.primitives.tiled import tiled_matmul, tiled_outer
from tiny_onn_func.primitives.vmap import flatten_runs, fold, outside_vmap, runs_first, unfold


def grouped_matmul(
    rows: Float[Tensor, "*runs rows in_dim"],
    weights: Float[Tensor, "*runs experts in_dim out_dim"],
    offsets: Int32[Tensor, "*runs experts"],
) -> Float[Tensor, "*runs rows out_dim"]:
    """out[n] = rows[n] @ weights[e] for offsets[e-1] <= n < offsets[e]; rows behind offsets[-1] give zeros."""
    return outside_vmap(lambda *plain: (GroupedMatmul.apply(*plain),), rows, weights, offsets)[0]


def grouped_outer(
    rows: Float[Tensor, "*runs rows in_dim"],
    grads: Float[Tensor, "*runs rows out_dim"],
    offsets: Int32[Tensor, "*runs experts"],
) -> Float[Tensor, "*runs experts in_dim out_dim"]:
    """out[e] = sum of rows[n]^T grads[n] over offsets[e-1] <= n < offsets[e]: the weight gradient of the matmul."""
    return outside_vmap(lambda *plain: (GroupedOuter.apply(*plain),), rows, grads, offsets)[0]


def dense_matmul(
    x: Float[Tensor, "*batch rows in_dim"], weights: Float[Tensor, "*#batch in_dim out_dim"]
) -> Float[Tensor, "*batch rows out_dim"]:
    """x @ weights, as groups of a grouped matmul where a kernel takes them.

    That is faster where the library's product leaves the processor's widest vectors unused (docs/benchmarks.md).
    """
    fits = x.shape[:-2] == weights.shape[:-2] and x.shape[-1] == weights.shape[-2]  # else the library's word on it
    if not fits or is_traced(x) or not runtime.supports(x, weights):
        return x @ weights
    ends = torch.arange(1, x.shape[:-2].numel() + 1, dtype=torch.int32, device=x.device) * x.shape[-2]
    out = grouped_matmul(x.reshape(-1, x.shape[-1]), weights.reshape(-1, *weights.shape[-2:]), ends)
    return out.reshape(*x.shape[:-1], -1)


class GroupedMatmul(PositionalFunction):
    @staticmethod
    def forward(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return matmul_kernel(rows, weights, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, offsets = ctx.saved_tensors
        grad_rows = GroupedMatmul.apply(grad, weights.mT, offsets) if ctx.needs_input_grad[0] else None
        grad_weights = GroupedOuter.apply(rows, grad, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weights, None

    @staticmethod
    def jvp(ctx: Any, rows_dot: Tensor | None, weights_dot: Tensor | None, _: None) -> Tensor:
        rows, weights, offsets = ctx.saved_tensors
        return sum_of(
            None if rows_dot is None else GroupedMatmul.apply(rows_dot, weights, offsets),
            None if weights_dot is None else GroupedMatmul.apply(rows, weights_dot, offsets),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, weights: Tensor, offsets: Tensor) -> Any:
        return GroupedMatmul.apply(*runs_first(info.batch_size, in_dims, rows, weights, offsets)), 0


class GroupedSum(PositionalFunction):
    """Two grouped matmuls added up: what flows back into rows that were multiplied with two sets of weights."""

    @staticmethod
    def forward(rows: Tensor, weights: Tensor, others: Tensor, other_weights: Tensor, offsets: Tensor) -> Tensor:
        return matmul_kernel(rows, weights, offsets, others, other_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, others, other_weights, offsets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            GroupedMatmul.apply(grad, weights.mT, offsets) if wanted[0] else None,
            GroupedOuter.apply(rows, grad, offsets) if wanted[1] else None,
            GroupedMatmul.apply(grad, other_weights.mT, offsets) if wanted[2] else None,
            GroupedOuter.apply(others, grad, offsets) if wanted[3] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *dots: Tensor | None) -> Tensor:
        *operands, offsets = ctx.saved_tensors
        out = None
        for at in range(4):
            if dots[at] is not None:
                pair = [dots[at], operands[at + 1]] if at % 2 == 0 else [operands[at - 1], dots[at]]
                out = sum_of(out, GroupedMatmul.apply(*pair, offsets))
        return sum_of(out, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        return GroupedSum.apply(*runs_first(info.batch_size, in_dims, *inputs)), 0


class GroupedOuter(PositionalFunction):
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
        grad_rows = GroupedMatmul.apply(grads, grad.mT, offsets) if ctx.needs_input_grad[0] else None
        grad_grads = GroupedMatmul.apply(rows, grad, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_grads, None

    @staticmethod
    def jvp(ctx: Any, rows_dot: Tensor | None, grads_dot: Tensor | None, _: None) -> Tensor:
        rows, grads, offsets = ctx.saved_tensors
        return sum_of(
            None if rows_dot is None else GroupedOuter.apply(rows_dot, grads, offsets),
            None if grads_dot is None else GroupedOuter.apply(rows, grads_dot, offsets),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, grads: Tensor, offsets: Tensor) -> Any:
        return GroupedOuter.apply(*runs_first(info.batch_size, in_dims, rows, grads, offsets)), 0


def matmul_kernel(
    rows: Float[Tensor, "*runs rows in_dim"],
    weights: Float[Tensor, "*runs experts in_dim out_dim"],
    offsets: Int32[Tensor, "*runs experts"],
    others: Float[Tensor, "*runs rows other_dim"] | None = None,
    other_weights: Float[Tensor, "*runs experts other_dim out_dim"] | None = None,
) -> Float[Tensor, "*runs rows out_dim"]:
    """Grouped matmul of rows and weights, plus that of `others` and `other_weights`, by the kernel where there is one.

    To be called inside a Function's forward, where tensors are plain: no transform wraps them.
    """
    pairs = [(rows, weights)] if others is None or other_weights is None else [(rows, weights), (others, other_weights)]
    if not is_traced(offsets) and runtime.supports(*itertools.chain(*pairs)):
        folded = [(flatten_runs(left, 2), flatten_runs(right, 3)) for left, right in pairs]
        out = forward_kernels.matmul(folded, flatten_runs(offsets, 1))
        return out.reshape(*rows.shape[:-1], -1)
    first, *more = (_matmul_fallback(*pair, offsets) for pair in pairs)
    return first + more[0] if more else first


def _matmul_fallback(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    runs = rows.shape[:-2]
    rows, weights, offsets = (flatten_runs(t, dims) for t, dims in ((rows, 2), (weights, 3), (offsets, 1)))
    if rows.shape[0] == 1:
        out = _matmul_of_one_run(rows[0], weights[0], offsets[0])[None]
    else:
        nobody = F.pad(weights, (0, 0, 0, 0, 0, 1))  # one more group a run, of zeros, takes its inactive rows
        out = _matmul_of_one_run(fold(rows), fold(nobody), _fold_offsets(offsets, rows.shape[1]))
        behind = torch.arange(rows.shape[1], device=rows.device) >= offsets[:, -1:]
        out = unfold(out, rows.shape[0]).masked_fill(behind.unsqueeze(-1), 0)  # 0 times garbage may be nan
    return out.reshape(*runs, *out.shape[1:])


def _matmul_of_one_run(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    _check_offsets("grouped_matmul", offsets, rows.shape[0])
    if not _reads_offsets(offsets):
        if not _has_fast_path(rows, weights):
            return tiled_matmul(rows, weights, offsets)
        out = F.grouped_mm(rows, weights, offs=offsets)
        owned = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
        return torch.where(owned.unsqueeze(-1), out, 0.0)
    if _has_fast_path(rows, weights):
        out = F.grouped_mm(rows, weights, offs=offsets)
        out[int(offsets[-1]) :] = 0  # the library leaves these rows as it found the memory
        return out
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for start, end, weight in _groups(offsets, weights):
        torch.mm(rows[start:end], weight, out=out[start:end])
    return out


def _outer_kernel(
    rows: Float[Tensor, "*runs rows in_dim"],
    grads: Float[Tensor, "*runs rows out_dim"],
    offsets: Int32[Tensor, "*runs experts"],
) -> Float[Tensor, "*runs experts in_dim out_dim"]:
    runs = rows.shape[:-2]
    rows, grads, offsets = (flatten_runs(t, dims) for t, dims in ((rows, 2), (grads, 2), (offsets, 1)))
    if not is_traced(offsets) and runtime.supports(rows, grads):
        out = forward_kernels.outer(rows, grads, offsets)
    elif rows.shape[0] == 1:
        out = _outer_of_one_run(rows[0], grads[0], offsets[0])[None]
    else:
        folded = _outer_of_one_run(fold(rows), fold(grads), _fold_offsets(offsets, rows.shape[1]))
        out = unfold(folded, rows.shape[0])[:, :-1]
    return out.reshape(*runs, *out.shape[1:])


def _outer_of_one_run(rows: Tensor, grads: Tensor, offsets: Tensor) -> Tensor:
    _check_offsets("grouped_outer", offsets, rows.shape[0])
    rows = rows.contiguous()
    if _has_fast_path(rows.mT, grads):
        return F.grouped_mm(rows.mT, grads, offs=offsets)
    if not _reads_offsets(offsets):
        return tiled_outer(rows, grads, offsets)
    out = rows.new_zeros(offsets.shape[0], rows.shape[1], grads.shape[1])
    for start, end, block in _groups(offsets, out):
        torch.mm(rows[start:end].mT, grads[start:end], out=block)
    return out


def _check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    """Refuse what the kernels refuse; where looking at it would wait for a device nothing is refused.

    Raises:
        IndexError: offsets that descend, or point behind the rows.
    """
    if not _reads_offsets(offsets):
        return
    ends = offsets.tolist()
    if not all(start <= end for start, end in itertools.pairwise((0, *ends, rows))):
        raise IndexError(f"{name}: expected offsets that ascend from 0 to {rows} at most, got {ends}")


def _reads_offsets(offsets: Tensor) -> bool:
    """True on a CPU outside of traces: elsewhere reading a size would wait for the device, or there is none."""
    return offsets.device.type == "cpu" and not is_traced(offsets)


def _has_fast_path(left: Tensor, right: Tensor) -> bool:
    """True if `F.grouped_mm` supports dtype, device and strides (multiples of 16 bytes); traces use tiles instead."""
    if is_traced(left) or not all(_is_aligned(t) for t in (left, right)):
        return False
    if left.device.type == "cuda":  # built for Ampere and newer
        return left.dtype == torch.bfloat16 and torch.cuda.get_device_capability(left.device) >= (8, 0)
    if left.device.type == "meta":
        return left.dtype == torch.bfloat16
    return left.device.type == "cpu" and left.dtype in (torch.float32, torch.bfloat16)


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


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        only = second if first is None else first
        assert only is not None, "a tangent is asked for only when an input has one"
        return only
    return first + second


def _fold_offsets(offsets: Tensor, rows: int) -> Tensor:
    """(R, E) -> R * (E + 1): the additional group of a run ends with its last row."""
    starts = rearrange(torch.arange(offsets.shape[0], device=offsets.device, dtype=offsets.dtype), "runs -> runs 1")
    last = repeat(offsets.new_full((1,), rows), "1 -> runs 1", runs=offsets.shape[0])
    return fold(torch.cat((offsets, last), dim=1) + starts * rows)
