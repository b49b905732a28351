"""Fused ops: a PyTorch reference that every transform can differentiate, and a kernel with a hand-written gradient.

    SQUARES = fused(reference=..., kernel=..., kernel_grad=..., dims=(2, 1), out_dims=(2,), smooth=1)
    (out,) = SQUARES(x, weight)

Which of the two runs is decided here and nowhere else. The kernel runs where it supports the tensors and nothing
records what is done to them; it sees plain tensors whose leading axes, those of vmaps among them, are one axis of runs.
The reference runs everywhere else: in other dtypes and devices, traced, and for derivatives of derivatives.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tiny_onn_func.kernels import runtime
from tiny_onn_func.primitives.function import PositionalFunction
from tiny_onn_func.primitives.vmap import flatten_runs, outside_vmap, runs_first, unwrap_if_dead

Values = tuple[Any, ...]
Fold = Callable[[Tensor, torch.Size], Tensor]  # (tensor, shape of the leading axes) -> what the kernel takes


class Like(NamedTuple):
    """An output that has the shape of an input, and is folded as that input is."""

    of: int


class FusedOp(NamedTuple):
    """Both ways to compute `(*inputs) -> outputs`, a tuple; called like a function.

    Inputs are `floats` floating point tensors, then other tensors, then numbers. Every tensor may have leading axes of
    runs, the same for all.
    """

    reference: Callable[..., Values]
    kernel: Callable[..., Values]
    kernel_grad: Callable[..., Values] | None
    floats: int
    smooth: int
    dims: Sequence[int | Fold] | None
    out_dims: Sequence[int | Like] | None
    leading: int
    function: type[Function] | None

    def __call__(self, *inputs: Any) -> Values:
        """By the kernel where it supports the tensors, else by the reference."""
        if not runtime.supports(*inputs[: self.floats]):
            return self.reference(*inputs)
        if self.function is not None:
            return outside_vmap(self.function.apply, *inputs)
        return outside_vmap(lambda *plain: _compute(self, plain), *inputs)


def fused(
    *,
    reference: Callable[..., Values],
    kernel: Callable[..., Values],
    kernel_grad: Callable[..., Values] | None = None,
    dims: Sequence[int | Fold] | None = None,
    out_dims: Sequence[int | Like] | None = None,
    floats: int = 1,
    smooth: int = 0,
    leading: int = 0,
) -> FusedOp:
    """Declare an op.

    Args:
        reference: the definition in PyTorch's operations; every transform follows it.
        kernel: the same on plain tensors with one axis of runs.
        kernel_grad: (gradients of the smooth outputs, inputs, outputs) -> those of the `floats` inputs, on such
            tensors; None for an op without a gradient.
        dims: of each input tensor, how many of its last axes belong to one run, the others are folded into one; or a
            function that folds it. None: the kernel takes tensors of any shape.
        out_dims: the same of each output, to be unfolded; or the input whose shape it has.
        floats: how many inputs decide whether the kernel may run, and have gradients.
        smooth: how many outputs have a gradient; they come first.
        leading: the input whose leading axes are those of the op; its entry in `dims` is a number.
    """
    op = FusedOp(reference, kernel, kernel_grad, floats, smooth, dims, out_dims, leading, None)
    return op if kernel_grad is None else op._replace(function=autograd_function(op))


def autograd_function(op: FusedOp) -> type[Function]:
    """With gradients by the kernel; derivatives of derivatives, and those of forward mode, are the reference's."""

    class Either(PositionalFunction):
        @staticmethod
        def forward(*inputs: Any) -> Values:
            return _compute(op, inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
            tensors = [t for t in inputs if isinstance(t, Tensor)]
            ctx.numbers, ctx.silent = inputs[len(tensors) :], len(output) - op.smooth
            ctx.mark_non_differentiable(*output[op.smooth :])
            ctx.save_for_backward(*tensors, *output)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Values:
            # what a torch.func.grad that has ended wrapped is saved in its wrappers, which no new transform takes
            saved, slopes = tuple(map(unwrap_if_dead, ctx.saved_tensors)), grads[: op.smooth]
            tensors, outputs = saved[: len(saved) - len(grads)], saved[len(saved) - len(grads) :]
            inputs = (*tensors, *ctx.numbers)
            if runtime.usable_now(*slopes, *inputs[: op.floats]):
                input_grads = _kernel_grad(op, slopes, inputs, outputs)
            else:
                smooth, followed = _smooth_part(op, inputs)
                input_grads = torch.func.vjp(smooth, *followed)[1](tuple(slopes))
            return *input_grads, *(None for _ in inputs[op.floats :])

        @staticmethod
        def jvp(ctx: Any, *dots: Any) -> Values:
            smooth, followed = _smooth_part(op, (*ctx.saved_tensors, *ctx.numbers))
            out, pull_back = torch.func.vjp(smooth, *followed)  # type: ignore[misc]
            # the pull-back is linear, and its own pull-back pushes forward: forward mode cannot be nested in itself
            zeros = map(torch.zeros_like, out)
            _, push_forward = torch.func.vjp(lambda *grads: pull_back(grads), *zeros)  # type: ignore[misc]
            return *push_forward(dots[: op.floats]), *(None for _ in range(ctx.silent))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            mapped = (
                runs_first(info.batch_size, (dim,), t)[0] if isinstance(t, Tensor) else t
                for t, dim in zip(inputs, in_dims, strict=True)
            )
            out = Either.apply(*mapped)
            return out, (0,) * len(out)

    return Either


def _compute(op: FusedOp, inputs: Values) -> Values:
    if not runtime.usable_now(*inputs[: op.floats]):
        outputs = op.reference(*inputs)
        return outputs if op.kernel_grad is None else tuple(t.clone() for t in outputs)  # a view would be no output
    if op.dims is None or op.out_dims is None:
        return op.kernel(*inputs)
    runs = _leading_axes(op, inputs)
    outputs = op.kernel(*_folded(op, inputs, runs))
    return tuple([_unfold(t, dim, inputs, runs) for t, dim in zip(outputs, op.out_dims, strict=True)])


def _kernel_grad(op: FusedOp, grads: Values, inputs: Values, outputs: Values) -> Values:
    assert op.kernel_grad is not None, "only ops with a gradient are autograd functions"
    if op.dims is None or op.out_dims is None:
        return op.kernel_grad(grads, inputs, outputs)
    runs = _leading_axes(op, inputs)
    folds = [op.dims[dim.of] if isinstance(dim, Like) else dim for dim in op.out_dims]
    folded_grads = tuple([_fold(grad, fold, runs) for grad, fold in zip(grads, folds, strict=False)])
    folded_outputs = tuple([_fold(t, fold, runs) for t, fold in zip(outputs, folds, strict=True)])
    input_grads = op.kernel_grad(folded_grads, _folded(op, inputs, runs), folded_outputs)
    return tuple([grad.view(t.shape) for grad, t in zip(input_grads, inputs[: op.floats], strict=True)])


def _leading_axes(op: FusedOp, inputs: Values) -> torch.Size:
    shape, dims = inputs[op.leading].shape, op.dims[op.leading]  # type: ignore[index]
    return shape[: len(shape) - dims]  # type: ignore[operator]


def _folded(op: FusedOp, inputs: Values, runs: torch.Size) -> Values:
    dims: Sequence[int | Fold] = op.dims or ()
    return *[_fold(t, dim, runs) for t, dim in zip(inputs, dims, strict=False)], *inputs[len(dims) :]


def _fold(t: Tensor, dim: int | Fold, runs: torch.Size) -> Tensor:
    return flatten_runs(t, dim) if isinstance(dim, int) else dim(t, runs)


def _unfold(t: Tensor, dim: int | Like, inputs: Values, runs: torch.Size) -> Tensor:
    if isinstance(dim, Like):
        return t.view(inputs[dim.of].shape)
    return t if len(runs) == 1 else t.view(runs + t.shape[t.ndim - dim :])


def _smooth_part(op: FusedOp, inputs: Values) -> tuple[Callable[..., Values], tuple[Tensor, ...]]:
    """The reference as a function of the differentiable inputs alone, without the outputs that have no gradient."""
    followed, rest = inputs[: op.floats], inputs[op.floats :]
    return lambda *own: op.reference(*own, *rest)[: op.smooth], followed
