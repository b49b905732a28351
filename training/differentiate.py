"""Gradients of an objective: torch.func under transforms, plain autograd where there is none.

Both give the same bits (a test compares them). torch.func wraps every tensor, and unless told otherwise differentiates
with `create_graph`, which keeps the graph of the gradients too: alone, a step then takes about twice as long.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.func import vjp

from tiny_onn_func.tree import leaves, tree_map

Objective = Callable[..., tuple[Tensor, Any]]


def gradients(objective: Objective, *trees: Any, reads: Any = ()) -> tuple[tuple[Any, ...], Any]:
    """(gradients of each tree, aux) of an objective `(*trees) -> (0-d value, aux)`.

    `reads` is what else the objective reads and somebody's derivative may follow.
    """
    if is_transformed((trees, reads)):
        value, pull_back, aux = vjp(objective, *trees, has_aux=True)  # type: ignore[misc]
        return pull_back(torch.ones_like(value), create_graph=_is_followed((trees, reads))), aux
    with torch.enable_grad():
        own = tree_map(lambda leaf: leaf.detach().requires_grad_(), trees)
        value, aux = objective(*own)
        flat = torch.autograd.grad(value, leaves(own), materialize_grads=True)
    grads = iter(flat)
    return tree_map(lambda _: next(grads), trees), tree_map(lambda leaf: leaf.detach(), aux)


def is_transformed(trees: Any) -> bool:
    """Whether a transform is at work, or the compiler traces, or somebody else's autograd follows the leaves."""
    at_work = torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None
    return at_work or _require_grad(trees)


def _is_followed(trees: Any) -> bool:
    """Whether gradients of the gradients may be asked for: by a transform that is no vmap, or by autograd."""
    if torch.compiler.is_compiling():
        return False
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() != functorch.TransformType.Vmap for level in levels) or _require_grad(trees)


def _require_grad(trees: Any) -> bool:
    return any(_innermost(leaf).requires_grad for leaf in leaves(trees) if isinstance(leaf, Tensor))


def _innermost(leaf: Tensor) -> Tensor:
    """What a mapped tensor wraps: the wrapper itself never says that it requires a gradient."""
    while functorch.is_batchedtensor(leaf):
        leaf = functorch.get_unwrapped(leaf)
    return leaf
