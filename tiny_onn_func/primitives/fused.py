"""One computation told twice: in PyTorch's operations, which transforms follow, and as a kernel with its gradient."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function

from tiny_onn_func.kernels import runtime
from tiny_onn_func.primitives.vmap import outside_vmap, runs_first

Values = tuple[Any, ...]


class FusedOp(NamedTuple):
    """Both ways of a computation. Every tensor may have leading axes of runs, the same of all.

    Inputs are `differentiable` tensors, then tensors without a gradient, then numbers; outputs are `smooth` ones, then
    those without a gradient.
    """

    plain: Callable[..., Values]  # *inputs -> outputs
    kernel: Callable[..., Values]  # the same
    kernel_grad: Callable[..., Values]  # (gradients of the smooth outputs, inputs, outputs) -> those of the inputs
    differentiable: int
    smooth: int


def fused(op: FusedOp) -> Callable[..., Values]:
    """(*inputs) -> outputs: by the kernel where it takes the tensors and nobody follows what is done, else plainly."""
    function = autograd_function(op)

    def either(*inputs: Any) -> Values:
        kernel = runtime.supports(*inputs[: op.differentiable])
        return outside_vmap(function.apply, *inputs) if kernel else op.plain(*inputs)

    return either


def autograd_function(op: FusedOp) -> type[Function]:
    """With gradients by the kernel; derivatives of derivatives, and those of forward mode, are the plain way's."""

    class Either(Function):
        @staticmethod
        def forward(*inputs: Any) -> Values:
            if runtime.usable_now(*inputs[: op.differentiable]):
                return op.kernel(*inputs)
            return tuple(t.clone() for t in op.plain(*inputs))  # a view of an input would be no output of its own

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
            if runtime.usable_now(*slopes, *inputs[: op.differentiable]):
                made = op.kernel_grad(slopes, inputs, outputs)
            else:
                smooth, followed = _smooth_part(op, inputs)
                made = torch.func.vjp(smooth, *followed)[1](tuple(slopes))
            return *made, *(None for _ in inputs[op.differentiable :])

        @staticmethod
        def jvp(ctx: Any, *dots: Any) -> Values:
            smooth, followed = _smooth_part(op, (*ctx.saved_tensors, *ctx.numbers))
            out, pull_back = torch.func.vjp(smooth, *followed)  # type: ignore[misc]
            # the pull-back is linear, and its own pull-back pushes forward: forward mode cannot be nested in itself
            zeros = map(torch.zeros_like, out)
            _, push_forward = torch.func.vjp(lambda *grads: pull_back(grads), *zeros)  # type: ignore[misc]
            return *push_forward(dots[: op.differentiable]), *(None for _ in range(ctx.silent))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            mapped = (
                runs_first(info.batch_size, (dim,), t)[0] if isinstance(t, Tensor) else t
                for t, dim in zip(inputs, in_dims, strict=True)
            )
            out = Either.apply(*mapped)
            return out, (0,) * len(out)

    # `apply` asks for the signature at every call; made once here, a small step is a tenth faster
    Either.forward.__signature__ = inspect.signature(Either.forward)  # type: ignore[attr-defined]
    return Either


def _smooth_part(op: FusedOp, inputs: Values) -> tuple[Callable[..., Values], tuple[Tensor, ...]]:
    """The plain way as a function of the differentiable inputs alone, without the outputs that have no gradient."""
    followed, rest = inputs[: op.differentiable], inputs[op.differentiable :]
    return lambda *own: op.plain(*own, *rest)[: op.smooth], followed
