"""A pure step as one compiled program: traced once into a flat graph, then `torch.compile`.

    step = compile_step(lambda state, batch: hyper_step(state, batch, hyper, config), state, batch)
    state, metrics = step(state, batch)

Tracing runs the whole step, hooks, gradients and vmap included, on tensors without values, and keeps the plain tensor
operations that it makes: none of what a compiler may stumble over (transforms, hooks, Python) is left in the graph.
Sizes are fixed: all later arguments have the example's shapes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def trace_step(step: Callable[..., Any], *example: Any) -> GraphModule:
    """The flat graph of `step`, which may be called in its place.

    Args:
        step: reads no tensor but its arguments.
        example: arguments; their shapes and dtypes count, not their values.
    """
    return make_fx(step, tracing_mode="fake")(*example)


def compile_step(step: Callable[..., Any], *example: Any, backend: str = "inductor") -> Callable[..., Any]:
    """`step` as a compiled program; it is compiled at its first call, which takes minutes, and needs a C++ compiler."""
    return torch.compile(trace_step(step, *example), backend=backend)
