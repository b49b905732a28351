"""Through vmap's wrappers: the plain tensor inside, whose shape has every mapped axis, and back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_restore_interpreter_stack

_LEFT: ContextVar[list[Any] | None] = ContextVar("_LEFT", default=None)  # the vmaps that `outside` has left


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


def over_runs(function: Callable[..., tuple[Tensor, ...]], *inputs: Any) -> tuple[Tensor, ...]:
    """The function of the plain tensors inside, every mapped axis in front as one, and what it gives mapped again.

    It runs outside of the vmaps, so nothing in it costs their dispatch. Where nothing is mapped, or another transform
    is at work, it gets the inputs as they are.
    """
    if not any(isinstance(t, Tensor) and functorch.is_batchedtensor(t) for t in inputs) or not only_vmaps():
        return function(*inputs)
    plain = [_runs_first(t) if isinstance(t, Tensor) else t for t in inputs]
    with outside():
        out = function(*plain)
    return tuple(unfold_runs(t) for t in out)


@contextmanager
def outside() -> Iterator[None]:
    """Outside of the vmaps at work, where plain tensors are what they are."""
    with temporarily_clear_interpreter_stack() as stack:
        token = _LEFT.set(stack or _LEFT.get())
        try:
            yield
        finally:
            _LEFT.reset(token)


@contextmanager
def inside_again() -> Iterator[None]:
    """Inside the vmaps that `outside` has left, for a hook that autograd calls meanwhile."""
    with temporarily_restore_interpreter_stack(_LEFT.get() or []):
        token = _LEFT.set(None)
        try:
            yield
        finally:
            _LEFT.reset(token)


def _runs_first(t: Tensor) -> Tensor:
    """(runs, ...) plain: as `fold_runs`, but what is not mapped is repeated without a copy."""
    shape, sizes, found = t.shape, list[int](), set[int]()
    while functorch.is_batchedtensor(t):
        found.add(functorch.maybe_get_level(t))
        t = functorch.get_unwrapped(t).movedim(functorch.maybe_get_bdim(t), 0)  # those of outer vmaps come to the front
    for level in _levels():
        runs = functorch.CVmapInterpreterPtr(level).batchSize()
        sizes.append(runs)
        if level.level() not in found:
            t = t.unsqueeze(len(sizes) - 1).expand(*t.shape[: len(sizes) - 1], runs, *t.shape[len(sizes) - 1 :])
    return t if len(sizes) == 1 else t.reshape(-1, *shape)


def _levels() -> Iterator[functorch.CInterpreter]:
    yield from functorch.get_interpreter_stack() or ()
