"""Check tensors from outside before anything indexes with them: dtype, shape and range, one line on what is wrong.

The compiled kernels trust what passes here (they check once more). Nothing waits for a device: on an accelerator the
range is asserted asynchronously, under a trace and on the meta device there are no values to look at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_onn_func.kernels.runtime import is_traced
from tiny_onn_func.primitives.vmap import unwrap_all


def check_indices(
    name: str,
    t: Tensor,
    low: int,
    high: int,
    *,
    shape: Sequence[int] | None = None,
    ignore: int | None = None,
) -> None:
    """Refuse what is no int64 tensor of that shape with values in [low, high); `ignore` is allowed beside them.

    Raises:
        ValueError: another dtype or shape.
        IndexError: a value out of range.
    """
    check_dtype(name, t, torch.int64)
    if shape is not None:
        check_shape(name, t, shape)
    plain = unwrap_all(t)
    if not _has_values(plain):
        return
    kept = plain if ignore is None else torch.where(plain == ignore, low, plain)
    besides = "" if ignore is None else f" or {ignore}"
    if plain.device.type != "cpu":
        inside = ((kept >= low) & (kept < high)).all()
        torch._assert_async(inside, f"{name}: expected {low} to {high - 1}{besides}, got a value outside")
        return
    lowest, highest = (int(value) for value in kept.aminmax())
    if lowest < low or highest >= high:
        came = lowest if lowest < low else highest
        raise IndexError(f"{name}: expected {low} to {high - 1}{besides}, got {came}")


def check_mask(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Refuse what is no int64 or bool tensor of that shape with numbers of 0 or more: 0 is padding.

    Raises:
        ValueError: another dtype or shape; a mask of floats may be one added to scores, where 0 is a real token.
        IndexError: a negative number.
    """
    check_shape(name, t, shape)
    if t.dtype == torch.bool:
        return
    if t.dtype != torch.int64:
        raise ValueError(f"{name}: expected torch.int64 or torch.bool, 0 on padding, got {t.dtype}")
    plain = unwrap_all(t)
    if not _has_values(plain):
        return
    if plain.device.type != "cpu":
        torch._assert_async((plain >= 0).all(), f"{name}: expected 0 or more, got a negative number")
    elif (lowest := int(plain.amin())) < 0:
        raise IndexError(f"{name}: expected 0 or more, got {lowest}")


def _has_values(plain: Tensor) -> bool:
    return not is_traced(plain) and plain.device.type != "meta" and plain.numel() > 0


def _check_layout(name: str, t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {t.layout}; call .to_dense()")


def check_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Refuse another shape, and a sparse tensor.

    Raises:
        ValueError: it has one, or is one.
    """
    _check_layout(name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")


def check_dtype(name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Refuse another dtype, and a sparse tensor; nothing is converted silently.

    Raises:
        ValueError: it has one, or is one.
    """
    _check_layout(name, t)
    if t.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {t.dtype}; convert it with .to({dtype})")
