"""Small pieces of a Qwen3 block: norm, rotary positions, gated activation, precision."""

from typing import overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.checks import check_indices
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.primitives.fused import Like, Values, fused
from tiny_onn_func.primitives.vmap import outside_vmap


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decisions and losses: float32, or the parameters' own if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def embed(ids: Int[Tensor, "*batch"], table: Float[Tensor, "*runs vocab dim"]) -> Float[Tensor, "*batch dim"]:
    """The rows of the table; runs of a vmap side by side in memory, as all that follows wants them.

    Raises:
        IndexError: an id that the table does not have: behind one run's lies another's.
    """
    return outside_vmap(lambda *plain: (_embed(*plain),), ids, table)[0]


def _embed(ids: Tensor, table: Tensor) -> Tensor:
    if table.ndim == 2:
        return F.embedding(ids, table)
    runs, vocab, _ = table.shape
    check_indices("ids", ids, 0, vocab)
    first = torch.arange(runs, device=ids.device).view(-1, *(1,) * (ids.ndim - 1)) * vocab
    return F.embedding(ids + first, table.flatten(0, 1))


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "*runs dim"] | None, eps: float
) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], None, eps) if weight is None else RMS_NORM(x, weight, eps)[0]


def _norm_reference(x: Tensor, weight: Tensor, eps: float) -> Values:
    if weight.ndim == 1:
        return (F.rms_norm(x, x.shape[-1:], weight, eps),)
    ones = (1,) * (x.ndim - weight.ndim)
    return (F.rms_norm(x, x.shape[-1:], None, eps) * weight.reshape(*weight.shape[:-1], *ones, -1),)


def _rows(x: Tensor, runs: torch.Size) -> Tensor:
    """(runs, rows, dim)."""
    return x.reshape(runs.numel(), -1, x.shape[-1])


RMS_NORM = fused(
    reference=_norm_reference,
    kernel=lambda x, weight, eps: (forward_kernels.rms_norm(x, weight, eps),),
    kernel_grad=lambda grads, inputs, _: forward_kernels.rms_norm_grad(grads[0], *inputs),
    dims=(_rows, 1), out_dims=(Like(0),), floats=2, smooth=1, leading=1,
)  # fmt: skip


def rotary_angles(
    positions: Int[Tensor, "*batch seq"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "*batch seq head_dim"], Float[Tensor, "*batch seq head_dim"]]:
    """cos and -+sin of position * theta^(-2i / head_dim), float32, as `rotate` takes them (arXiv 2104.09864).

    Both halves of a head have the same angles; the sine is negative in the first.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].to(torch.float32) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Float[Tensor, "*batch0 heads seq dim"],
    cos: Float[Tensor, "*batch1 seq dim"],
    sin: Float[Tensor, "*batch1 seq dim"],
) -> Float[Tensor, "*batch0 heads seq dim"]:
    """Rotary embedding with the two halves of a head as pairs, as Qwen3 and Llama store them."""
    cos, sin = (rearrange(t, "... seq dim -> ... 1 seq dim").to(x.dtype) for t in (cos, sin))
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def swiglu_reference(gate: Float[Tensor, "*batch dim"], up: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


@overload
def as_wide_as(x: Tensor, number: Tensor) -> Tensor: ...
@overload
def as_wide_as(x: Tensor, number: int | float | Tensor) -> int | float | Tensor: ...
def as_wide_as(x: Tensor, number: int | float | Tensor) -> int | float | Tensor:
    """A number of each run, with as many axes as x, whose first ones are the runs; a Python number as it is."""
    return number[(..., *(None,) * (x.ndim - number.ndim))].to(x.device) if isinstance(number, Tensor) else number


def as_scalar(
    number: int | float | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Float[Tensor, "*runs"] | Int[Tensor, "*runs"]:
    """A number as a tensor on a device. A Python number is filled in there: a copy from the host would wait."""
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, dtype=dtype, device=device)


def scale_gradient(x: Tensor, scale: int | float | Tensor) -> Tensor:
    """The value of x, with its gradient multiplied by `scale`; a Python 0 or 1 costs nothing."""
    if isinstance(scale, float | int) and scale == 0:
        return x.detach()
    if isinstance(scale, float | int) and scale == 1:
        return x
    scale = as_wide_as(x, scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
    return x.detach() + scale * (x - x.detach())


def swiglu(gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows inner"]:
    """silu(gate) * up, forward and backward in one pass each where a kernel takes them."""
    return SWIGLU(gate, up)[0]


SWIGLU = fused(
    reference=lambda gate, up: (swiglu_reference(gate, up),),
    kernel=lambda gate, up: (forward_kernels.swiglu(gate, up),),
    kernel_grad=lambda grads, inputs, _: forward_kernels.swiglu_grad(*grads, *inputs),
    floats=2, smooth=1,
)  # fmt: skip
