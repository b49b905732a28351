"""Leave and re-enter vmap: unwrap batched tensors with their mapped axes in front, call a function once, rewrap.

Also the axis of runs itself: moved to the front, folded into the axis behind it, and unfolded.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from tiny_onn_func.tree import leaves_and_structure, rebuild, tree_map


class Axis(NamedTuple):
    """One mapped axis of a plain tensor: its dimension, and the level of the vmap that it belongs to."""

    dim: int
    level: int


def unwrap(t: Tensor) -> tuple[Tensor, list[Axis]]:
    """Plain tensor inside a batched one, and its mapped axes, outermost first; a plain tensor is returned as it is."""
    axes = []
    while functorch.is_batchedtensor(t):
        axes.append(Axis(functorch.maybe_get_bdim(t), functorch.maybe_get_level(t)))
        t = functorch.get_unwrapped(t)
    return t, axes


def rewrap(plain: Tensor, axes: list[Axis]) -> Tensor:
    """Inverse of `unwrap`: wrap a plain tensor with these mapped axes."""
    for dim, level in reversed(axes):
        plain = functorch._add_batch_dim(plain, dim, level)
    return plain


def is_wrapped(t: Tensor) -> bool:
    """True inside a torch.func transform that batches or differentiates this tensor."""
    return bool(functorch.is_functorch_wrapped_tensor(t))


def unwrap_if_dead(t: Tensor) -> Tensor:
    """The tensor inside the wrapper of a transform that has ended; any other tensor is returned unchanged."""
    return functorch.unwrap_if_dead(t)


def unwrap_all(t: Tensor) -> Tensor:
    """The plain tensor inside every transform's wrapper, mapped axes wherever they lie; only to look at its values."""
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def only_vmaps() -> bool:
    """True if every active transform is a vmap."""
    return all(level.key() == functorch.TransformType.Vmap for level in _levels())


def outside_vmap(function: Callable[..., tuple[Tensor, ...]], *inputs: Any) -> tuple[Tensor, ...]:
    """Call a function on the plain tensors inside, all mapped axes merged in front, and rewrap its outputs.

    It runs outside of the vmaps, so nothing in it costs their dispatch; with the inputs as they are, if none is mapped.
    Where another transform is at work it runs inside of all.
    """
    if not functorch.get_interpreter_stack() or not only_vmaps():
        return function(*inputs)
    if not any(isinstance(t, Tensor) and functorch.is_batchedtensor(t) for t in inputs):
        with temporarily_clear_interpreter_stack():
            return function(*inputs)
    levels = [(level.level(), functorch.CVmapInterpreterPtr(level).batchSize()) for level in _levels()]
    plain = [_runs_first(t, levels) if isinstance(t, Tensor) else t for t in inputs]
    with temporarily_clear_interpreter_stack():
        out = function(*plain)
    return tuple(_mapped_again(t, levels) if isinstance(t, Tensor) else t for t in out)


def outside_vmap_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """`outside_vmap` on the tensors of a tree, for a function from a tree to a tree."""
    if not functorch.get_interpreter_stack():
        return function(tree)
    inputs, structure = leaves_and_structure(tree)
    shapes: list[Any] = []

    def of_runs(*inputs: Any) -> tuple[Any, ...]:
        out, shape = leaves_and_structure(function(rebuild(structure, inputs)))
        shapes.append(shape)
        return tuple(out)

    outputs = outside_vmap(of_runs, *inputs)  # fills `shapes`
    return rebuild(shapes[0], outputs)


def each_run(function: Callable[[Any], Any], tree: Any, axes: int) -> Any:
    """Map a function of one run over a tree whose tensors have `axes` leading axes of runs."""
    if not axes:
        return function(tree)
    dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tree)
    return torch.func.vmap(lambda run: each_run(function, run, axes - 1), (dims,))(tree)


def _runs_first(t: Tensor, levels: list[tuple[int, int]]) -> Tensor:
    """Plain tensor (runs, ...): axes of outer vmaps first; unmapped tensors are expanded without a copy."""
    shape, mapped = t.shape, set[int]()
    while functorch.is_batchedtensor(t):
        mapped.add(functorch.maybe_get_level(t))
        dim = functorch.maybe_get_bdim(t)
        t = functorch.get_unwrapped(t)
        t = t if dim == 0 else t.movedim(dim, 0)
    for place, (level, runs) in enumerate(levels):
        if level not in mapped:
            t = t.unsqueeze(place).expand(*t.shape[:place], runs, *t.shape[place:])
    return t if len(levels) == 1 else t.reshape(-1, *shape)


def _mapped_again(plain: Tensor, levels: list[tuple[int, int]]) -> Tensor:
    """Inverse of `_runs_first`, for any tensor with as many runs."""
    t = plain if len(levels) == 1 else plain.reshape(*(runs for _, runs in levels), *plain.shape[1:])
    for level, _ in levels:  # the outermost first: its axis lies in front
        t = functorch._add_batch_dim(t, 0, level)
    return t


def _levels() -> Iterator[functorch.CInterpreter]:
    yield from functorch.get_interpreter_stack() or ()


def runs_first(runs: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Move the mapped axis of every tensor to the front; unmapped tensors are expanded without a copy."""
    return tuple(
        t.expand(runs, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=False)
    )


def fold(t: Tensor) -> Tensor:
    return rearrange(t, "runs first ... -> (runs first) ...")


def unfold(t: Tensor, runs: int) -> Tensor:
    return rearrange(t, "(runs first) ... -> runs first ...", runs=runs)


def flatten_runs(t: Tensor, dims: int) -> Tensor:
    """Flatten all axes but the last `dims` into one axis of runs, of size 1 if there are none."""
    first = t.ndim - dims
    if first == 1:  # the common case, without a call into torch
        return t
    return t.reshape(t.shape[:first].numel(), *t.shape[first:])


def drop_repeated_axes(t: Tensor, dims: int) -> Tensor:
    """Drop leading axes that are expanded (stride 0), in front of the last `dims`."""
    while t.ndim > dims and t.stride(0) == 0:
        t = t[0]
    return t
