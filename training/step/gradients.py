"""Gradients of an objective: torch.func where derivatives are followed, plain autograd where they are not.

Both give the same numbers (a test compares them). torch.func wraps every tensor, and vmap dispatches every operation
once more. Where nothing but vmap is at work the objective gets the plain tensors inside, with an axis of runs in front,
and one forward and one backward pass serve all runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from tiny_onn_func.primitives.vmap import only_vmaps, outside_vmap_tree, unwrap
from tiny_onn_func.tree import leaves, tree_map

Objective = Callable[..., tuple[Tensor, Any]]


def gradients(objective: Objective, trees: tuple[Any, ...], given: Any = ()) -> tuple[tuple[Any, ...], Any]:
    """(gradients of each tree, aux) of an objective `(*trees, given) -> (value, aux)`.

    Value and aux are those of one run, or of several, whose axis is then in front of every tensor of `trees`, `given`,
    value and aux. Whatever may be mapped or followed by somebody's derivative has to come in by `trees` or `given`.
    """
    if _is_followed((trees, given)):
        value, pull_back, aux = vjp(lambda *own: objective(*own, given), *trees, has_aux=True)  # type: ignore[misc]
        return pull_back(torch.ones_like(value), create_graph=True), aux

    def of_runs(both: tuple[Any, Any]) -> tuple[Any, Any]:
        trees, given = both
        with torch.enable_grad():
            own = tree_map(lambda leaf: leaf.detach().requires_grad_(), trees)
            value, aux = objective(*own, given)
            slopes = iter(torch.autograd.grad(value.sum(), leaves(own), materialize_grads=True))
        return tree_map(lambda _: next(slopes), trees), tree_map(lambda leaf: leaf.detach(), aux)

    return outside_vmap_tree(of_runs, (trees, given))


def _is_followed(trees: Any) -> bool:
    """Whether gradients of the gradients may be asked for: by a transform that is no vmap, or by autograd."""
    return not only_vmaps() or any(unwrap(leaf)[0].requires_grad for leaf in leaves(trees) if isinstance(leaf, Tensor))
