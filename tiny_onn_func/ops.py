"""Small pieces of a Qwen3 block: norm, rotary positions, gated activation, precision."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decisions and losses: float32, or the parameters' own if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"] | None, eps: float
) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


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
    x: Float[Tensor, "batch heads seq dim"],
    cos: Float[Tensor, "*batch1 seq dim"],
    sin: Float[Tensor, "*batch1 seq dim"],
) -> Float[Tensor, "batch heads seq dim"]:
    """Rotary embedding with the two halves of a head as pairs, as Qwen3 and Llama store them."""
    cos, sin = (rearrange(t, "... seq dim -> ... 1 seq dim").to(x.dtype) for t in (cos, sin))
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def swiglu(gate: Float[Tensor, "*batch dim"], up: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def scale_gradient(x: Tensor, scale: int | float | Tensor) -> Tensor:
    """The value of x, with its gradient multiplied by `scale`; a Python 0 or 1 costs nothing."""
    if isinstance(scale, float | int) and scale == 0:
        return x.detach()
    if isinstance(scale, float | int) and scale == 1:
        return x
    scale = scale.to(x.dtype) if isinstance(scale, Tensor) else scale
    return x.detach() + scale * (x - x.detach())
