"""Through vmap's wrappers: the plain tensor inside, whose shape has every mapped axis, and back."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch


class Axis(NamedTuple):
    """One mapped axis of a plain tensor: where it lies, and the level of the vmap that it belongs to."""

    dim: int
    level: int


def peel(t: Tensor) -> tuple[Tensor, list[Axis]]:
    """What a mapped tensor wraps, and its mapped axes, the outermost wrapper first; a plain tensor is itself."""
    axes = []
    while functorch.is_batchedtensor(t):
        axes.append(Axis(functorch.maybe_get_bdim(t), functorch.maybe_get_level(t)))
        t = functorch.get_unwrapped(t)
    return t, axes


def wrap(plain: Tensor, axes: list[Axis]) -> Tensor:
    """The mapped tensor that `peel` took apart, or another of the same axes."""
    for dim, level in reversed(axes):
        plain = functorch._add_batch_dim(plain, dim, level)
    return plain


def only_vmaps() -> bool:
    """Whether no transform but vmap is at work."""
    return all(level.key() == functorch.TransformType.Vmap for level in _levels())


def with_all_axes(t: Tensor) -> Tensor:
    """The tensor with the axis of every vmap at work; a copy where one was missing, so that runs may part."""
    had = {axis.level for axis in peel(t)[1]}
    for level in _levels():
        if level.level() not in had:
            runs = functorch.CVmapInterpreterPtr(level).batchSize()
            t = t + functorch._add_batch_dim(torch.zeros(runs, dtype=t.dtype, device=t.device), 0, level.level())
    return t


def fold_runs(t: Tensor) -> Tensor:
    """(runs, ...) plain: all mapped axes in front as one, those of outer vmaps first; one run where there is none."""
    shape = t.shape
    t = with_all_axes(t)
    while functorch.is_batchedtensor(t):
        t = functorch.get_unwrapped(t).movedim(functorch.maybe_get_bdim(t), 0)
    return t.reshape(-1, *shape)


def unfold_runs(plain: Tensor) -> Tensor:
    """What `fold_runs` folded."""
    levels = list(_levels())
    sizes = [functorch.CVmapInterpreterPtr(level).batchSize() for level in levels]
    t = plain.reshape(*sizes, *plain.shape[1:])
    for level in levels:  # the outermost first: its axis lies in front
        t = functorch._add_batch_dim(t, 0, level.level())
    return t


def _levels() -> Iterator[functorch.CInterpreter]:
    yield from functorch.get_interpreter_stack() or ()
