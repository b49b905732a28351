"""softmax(q k^T + bias) v: where a kernel takes the tensors with gradients and a vmap rule for it, else plainly."""

import inspect
from typing import Any

from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from tiny_onn_func import native
from tiny_onn_func.grouped import batch_first, fold, unfold


def attend(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "#batch seq seq"],
) -> Float[Tensor, "batch groups share seq dim"]:
    """What each query takes from the values; `share` queries have one key and value.

    Args:
        bias: added to the scores, the dtype's minimum on what may not be seen; later keys never are.
    """
    if native.can_take(q, k, v, bias):
        return Attend.apply(q, k, v, bias)[0]
    return einsum(_scores(q, k, bias).softmax(dim=-1), v, f"{SCORES}, {KEYS} -> {QUERIES}")


class Attend(Function):
    """The second output, logarithms of the softmaxes' sums, saves the kernel's backward a pass; it has no gradient."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if native.may_run(q, k, v, bias):
            return native.attention(q, k, v, bias)
        scores = _scores(q, k, bias)
        out = einsum(scores.softmax(dim=-1), v, f"{SCORES}, {KEYS} -> {QUERIES}")
        return out, scores.logsumexp(dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, log_sums = ctx.saved_tensors
        if native.may_run(q, k, v, bias, grad):
            return *native.attention_grad(q, k, v, bias, out, log_sums, grad), None
        p = _scores(q, k, bias).softmax(dim=-1)
        slope = einsum(grad, v, f"{QUERIES}, {KEYS} -> {SCORES}")
        mean = reduce(p * slope, "b groups share i j -> b groups share i 1", "sum")
        grad_scores = p * (slope - mean)
        return (
            einsum(grad_scores, k, f"{SCORES}, {KEYS} -> {QUERIES}"),
            einsum(grad_scores, q, f"{SCORES}, {QUERIES} -> {KEYS}"),
            einsum(p, grad, f"{SCORES}, {QUERIES} -> {KEYS}"),
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, _: Any
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, bias = ctx.saved_tensors
        p = _scores(q, k, bias).softmax(dim=-1)
        dot = p.new_zeros(())
        if q_dot is not None:
            dot = dot + einsum(q_dot, k, f"{QUERIES}, {KEYS} -> {SCORES}")
        if k_dot is not None:
            dot = dot + einsum(q, k_dot, f"{QUERIES}, {KEYS} -> {SCORES}")
        p_dot = p * dot
        p_dot = p_dot - p * reduce(p_dot, "b groups share i j -> b groups share i 1", "sum")
        out = einsum(p_dot, v, f"{SCORES}, {KEYS} -> {QUERIES}")
        if v_dot is not None:
            out = out + einsum(p, v_dot, f"{SCORES}, {KEYS} -> {QUERIES}")
        return out, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        runs, batch = info.batch_size, q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1]
        shared = in_dims[3] is None and bias.shape[0] == 1
        q, k, v = batch_first(runs, in_dims, q, k, v)
        if not shared:
            (bias,) = batch_first(runs, in_dims[3:], bias)
            bias = fold(bias.expand(-1, batch, -1, -1))
        out = Attend.apply(fold(q), fold(k), fold(v), bias)
        return tuple(unfold(t, runs) for t in out), (0, 0)


Attend.forward.__signature__ = inspect.signature(Attend.forward)  # type: ignore[attr-defined]  # see grouped.py

QUERIES, KEYS = "b groups share i dim", "b groups j dim"
SCORES = "b groups share i j"


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return einsum(q, k, f"{QUERIES}, {KEYS} -> {SCORES}") + rearrange(bias, "batch i j -> batch 1 1 i j")
