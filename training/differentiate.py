"""Gradients of an objective: torch.func where derivatives are followed, plain autograd where they are not.

Both give the same numbers (a test compares them). torch.func wraps every tensor, and under vmap makes each backward
once more out of mapped pieces. Where nothing but vmap is at work, autograd sees through it: the plain tensors inside
have the mapped axes, and one plain backward serves all runs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.func import vjp

from tiny_onn_func.mapped import only_vmaps, outside, peel, with_all_axes, wrap
from tiny_onn_func.tree import leaves, tree_map

Objective = Callable[..., tuple[Tensor, Any]]


def gradients(objective: Objective, *trees: Any, reads: Any = ()) -> tuple[tuple[Any, ...], Any]:
    """(gradients of each tree, aux) of an objective `(*trees) -> (0-d value, aux)`.

    `reads` is what else the objective reads and somebody's derivative may follow.
    """
    if _is_followed((trees, reads)):
        value, pull_back, aux = vjp(objective, *trees, has_aux=True)  # type: ignore[misc]
        return pull_back(torch.ones_like(value), create_graph=True), aux
    with torch.enable_grad():
        own = tree_map(_leaf_of_its_own, trees)
        value, aux = objective(*own)
        inside = [peel(leaf) for leaf in leaves(own)]
        total, plain = peel(value)[0], [leaf for leaf, _ in inside]
        # A backward pass of plain tensors needs no dispatch of the vmaps; a device's own thread would not find them.
        with outside() if total.device.type == "cpu" else nullcontext():
            flat = torch.autograd.grad(total.sum(), plain, materialize_grads=True)
    grads = iter([wrap(grad, axes) for grad, (_, axes) in zip(flat, inside, strict=True)])
    return tree_map(lambda _: next(grads), trees), tree_map(lambda leaf: leaf.detach(), aux)


def _is_followed(trees: Any) -> bool:
    """Whether gradients of the gradients may be asked for: by a transform that is no vmap, or by autograd."""
    return not only_vmaps() or _require_grad(trees)


def _require_grad(trees: Any) -> bool:
    return any(peel(leaf)[0].requires_grad for leaf in leaves(trees) if isinstance(leaf, Tensor))


def _leaf_of_its_own(leaf: Tensor) -> Tensor:
    """The same numbers as a leaf of a new graph, one run's apart from another's."""
    plain, axes = peel(with_all_axes(leaf.detach()))
    with enable_inplace_requires_grad(True):
        return wrap(plain.detach().requires_grad_(), axes)
