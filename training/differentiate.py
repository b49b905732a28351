"""Gradients of an objective: torch.func under transforms, plain autograd where there is none.

Both give the same bits (a test compares them). torch.func differentiates with `create_graph`, which keeps the graph of
the gradients too, and wraps every tensor: alone, a step then takes about twice as long.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from tiny_onn_func.tree import leaves, tree_map

Objective = Callable[..., tuple[Tensor, Any]]


def gradients(objective: Objective, *trees: Any, reads: Any = ()) -> tuple[tuple[Any, ...], Any]:
    """(gradients of each tree, aux) of an objective `(*trees) -> (0-d value, aux)`.

    `reads` is what else the objective reads and somebody's autograd may follow.
    """
    if _is_transformed((trees, reads)):
        grads, (_, aux) = grad_and_value(objective, argnums=tuple(range(len(trees))), has_aux=True)(*trees)
        return grads, aux
    with torch.enable_grad():
        own = tree_map(lambda leaf: leaf.detach().requires_grad_(), trees)
        value, aux = objective(*own)
        flat = torch.autograd.grad(value, leaves(own), materialize_grads=True)
    grads = iter(flat)
    return tree_map(lambda _: next(grads), trees), tree_map(lambda leaf: leaf.detach(), aux)


def _is_transformed(trees: Any) -> bool:
    """Whether a transform is at work, or the compiler traces, or somebody else's autograd follows the leaves."""
    at_work = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return at_work or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(trees))
