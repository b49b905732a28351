"""The axis of runs that vmap maps: brought to the front, folded into the axis behind it, and unfolded."""

from einops import rearrange
from torch import Tensor


def batch_first(runs: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Every tensor with the mapped axis first; those that are not mapped are repeated without a copy."""
    return tuple(
        t.expand(runs, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=False)
    )


def fold(t: Tensor) -> Tensor:
    return rearrange(t, "runs first ... -> (runs first) ...")


def unfold(t: Tensor, runs: int) -> Tensor:
    return rearrange(t, "(runs first) ... -> runs first ...", runs=runs)


def one_axis(t: Tensor, dims: int) -> Tensor:
    """All axes but the last `dims` as one axis of runs; one run where there is none."""
    first = t.ndim - dims
    return t.reshape(t.shape[:first].numel(), *t.shape[first:])


def one_of_shared(t: Tensor, dims: int) -> Tensor:
    """Without the axes in front of the last `dims` that are there only by repetition."""
    while t.ndim > dims and t.stride(0) == 0:
        t = t[0]
    return t
