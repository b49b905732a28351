"""Nested dicts of tensors: map, flatten by dotted name, stack runs, split off the router."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public pytree module (2.13)

Tree = dict[str, Any]  # nested dicts with tensors at the leaves
ROUTER_LEAVES = frozenset({"router", "router_bias", "token_table", "table_on", "default_output"})


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The same structure with `function(leaf, *leaves_of_rest)` at every leaf; dicts and NamedTuples are structure."""
    return pytree.tree_map(function, tree, *rest)


def leaves(tree: Any) -> list[Any]:
    """The leaves in insertion order."""
    return pytree.tree_leaves(tree)


def leaves_and_structure(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """(leaves in insertion order, what `rebuild` needs to make a tree of the same form)."""
    return pytree.tree_flatten(tree)


def rebuild(structure: pytree.TreeSpec, new_leaves: Iterable[Any]) -> Any:
    """A tree of that structure with other leaves."""
    return pytree.tree_unflatten(list(new_leaves), structure)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": t}} -> {"a.b": t}, in insertion order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if type(value) is not Tensor and isinstance(value, Mapping):  # an abstract class is searched for at length
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`; leaves of one dict lie together."""
    tree: Tree = {}
    for name, leaf in flat.items():
        path, last = _path(name)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


@lru_cache(maxsize=1024)  # the names of a model's leaves are asked for at every step
def _path(name: str) -> tuple[Any, str]:
    """(keys of the dicts around a leaf, its own key)."""
    *path, last = name.split(".")
    return tuple(path), last


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The tree with every tensor on a device; a copy from pinned memory to it does not wait. Other leaves stay.

    float64 becomes `number_dtype(device)`.
    """
    device = torch.device(device)
    ahead, widest = device.type != "cpu", number_dtype(device)  # what comes to the CPU is read at once

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, widest if leaf.dtype == torch.float64 else leaf.dtype, non_blocking=ahead)

    return tree_map(moved, tree)


def number_dtype(device: torch.device) -> torch.dtype:
    """float64, as wide as Python's own numbers; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_of(tree: Any) -> torch.device:
    """The device of a tree's first tensor."""
    return next(leaf.device for leaf in leaves(tree) if isinstance(leaf, Tensor))


def stack(trees: Sequence[Any]) -> Any:
    """R trees of one structure -> one tree whose leaves have a new leading axis of size R (the axis vmap maps)."""
    if not trees:
        raise ValueError("stack: expected at least one tree, got none")
    return tree_map(lambda *same: torch.stack([torch.as_tensor(leaf) for leaf in same]), *trees)


def unstack(tree: Any) -> list[Any]:
    """The inverse of `stack`."""
    flat, spec = pytree.tree_flatten(tree)
    return [pytree.tree_unflatten(list(run), spec) for run in zip(*(leaf.unbind(0) for leaf in flat), strict=True)]


def partition(tree: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Parameters -> (fast, router): the router's leaves and all others, each with the nesting of the whole."""
    flat = flatten(tree)
    router = {name: leaf for name, leaf in flat.items() if _path(name)[1] in ROUTER_LEAVES}
    fast = {name: leaf for name, leaf in flat.items() if name not in router}
    return unflatten(fast), unflatten(router)


def merge(fast: Mapping[str, Any], router: Mapping[str, Any]) -> Tree:
    """The inverse of `partition`; the router's leaves come first in their dict, as in the spec."""
    by_home: dict[str, dict[str, Any]] = {}
    for name, leaf in flatten(router).items():
        by_home.setdefault(name.rpartition(".")[0], {})[name] = leaf
    merged: dict[str, Any] = {}
    for name, leaf in flatten(fast).items():
        merged |= by_home.pop(name.rpartition(".")[0], {})
        merged[name] = leaf
    for rest in by_home.values():
        merged |= rest
    return unflatten(merged)


def walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of any tree of dicts, NamedTuples and sequences."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        yield ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path), leaf
