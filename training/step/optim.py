"""AdamW as a pair of pure functions, clipping, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import as_scalar, as_wide_as
from tiny_onn_func.primitives.vmap import outside_vmap_tree
from tiny_onn_func.tree import Tree, flatten, leaves, number_dtype, tree_map, unflatten
from training.step.hyper_params import HyperParams, Number


class AdamWState(NamedTuple):
    """Number of updates made, and the running moments of the gradient; `mu` and `nu` have the parameters' structure."""

    updates: Tensor  # () int64
    mu: Tree
    nu: Tree


def adamw_init(params: Tree) -> AdamWState:
    """State before the first update: moments zero."""
    leaf = leaves(params)[0]
    zeros = tree_map(torch.zeros_like, params)
    return AdamWState(leaf.new_zeros((), dtype=torch.int64), zeros, tree_map(torch.zeros_like, params))


def adamw_update(
    params: Tree,
    grads: Tree,
    state: AdamWState,
    *,
    lr: Number,
    weight_decay: Number,
    hyper: HyperParams,
    grad_scale: Number = 1.0,
    backbone_scale: Number = 1.0,
) -> tuple[Tree, AdamWState]:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101); gradients are multiplied by `grad_scale` first.

    mu = b1 mu + (1 - b1) g;  nu = b2 nu + (1 - b2) g^2
    p = p (1 - lr wd) - lr / (1 - b1^t) * mu / (sqrt(nu / (1 - b2^t)) + eps)

    Decay acts on matrices; norms, one number a channel, have none. Where nobody follows derivatives, a kernel makes the
    step for all runs of a vmap at once. `backbone_scale` multiplies the rate, and so the decay, of every leaf that is
    no expert's.
    """
    inputs = params, grads, state, lr, weight_decay, hyper, grad_scale, backbone_scale
    return outside_vmap_tree(lambda inputs: _updated(*inputs), inputs)


def _updated(
    params: Tree, grads: Tree, state: AdamWState, lr: Number, weight_decay: Number, hyper: HyperParams,
    grad_scale: Number, backbone_scale: Number,
) -> tuple[Tree, AdamWState]:  # fmt: skip
    updates = state.updates + 1
    t = updates.to(
        number_dtype(updates.device)
    )  # as Python's own numbers: in float32 the corrections would lose half of their digits
    step_size = lr / (1 - hyper.beta1**t)
    root_correction = (1 - hyper.beta2**t).sqrt()
    # step / (sqrt(nu) / root + eps) = (step root) / (sqrt(nu) + eps root): one pass less over each leaf
    numbers = grad_scale, 1 - hyper.beta1, 1 - hyper.beta2, hyper.eps * root_correction
    steps: Steps = {
        (backbone, decays): (
            *numbers, 1 - lr * share * weight_decay if decays else 1.0, step_size * share * root_correction,
        )
        for backbone, share in ((True, backbone_scale), (False, 1.0)) for decays in (True, False)
    }  # fmt: skip
    p, g, mu, nu = (flatten(tree) for tree in (params, grads, state.mu, state.nu))
    kinds = {name: (is_backbone(name), has_decay(name)) for name in p}
    if _may_take_kernel((p, g, mu, nu), steps.values()):
        new = _native_update(p, g, mu, nu, kinds, steps, updates.shape)
    else:
        new = _update(p, g, mu, nu, kinds, steps)
    trees = [unflatten({name: leaf[place] for name, leaf in new.items()}) for place in range(3)]
    return trees[0], AdamWState(updates, trees[1], trees[2])


Leaves = dict[str, Tensor]
Kind = tuple[bool, bool]  # whether the leaf is of the backbone, and whether it decays
Steps = dict[Kind, tuple[Number, ...]]  # scale, 1 - beta1, 1 - beta2, eps, decay, step


def _update(
    p: Leaves, g: Leaves, mu: Leaves, nu: Leaves, kinds: dict[str, Kind], steps: Steps
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The AdamW update in PyTorch's operations."""
    new = {}
    for name, value in p.items():
        scale, into_mu, into_nu, eps, decay, step = (_for_leaf(number, value) for number in steps[kinds[name]])
        grad = g[name] * scale
        m, v = torch.lerp(mu[name], grad, into_mu), torch.lerp(nu[name], grad.square(), into_nu)
        new[name] = value * decay - step * (m / (_root(v) + eps)), m, v
    return new


def _native_update(
    p: Leaves, g: Leaves, mu: Leaves, nu: Leaves, kinds: dict[str, Kind], steps: Steps, runs: torch.Size
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The AdamW update by the kernel, each leaf read and written once."""
    numbers = {kind: _stacked(steps[kind], runs) for kind in set(kinds.values())}
    flat = ([t.reshape(runs.numel(), -1) for t in tree.values()] for tree in (p, {n: g[n] for n in p}, mu, nu))
    updated = step_kernels.adamw([numbers[kinds[name]] for name in p], *flat)
    shaped = ([t.view(leaf.shape) for t, leaf in zip(leaves, p.values(), strict=True)] for leaves in updated)
    return dict(zip(p, zip(*shaped, strict=True), strict=True))


def _may_take_kernel(trees: Iterable[Leaves], numbers: Iterable[tuple[Number, ...]]) -> bool:
    """True if the kernel supports the leaves and nothing records what is computed from leaves or numbers."""
    tensors = [leaf for tree in trees for leaf in tree.values()]
    mapped = [number for each in numbers for number in each if isinstance(number, Tensor)]
    return runtime.usable_now(*tensors) and runtime.is_untracked(*mapped)


def _stacked(numbers: tuple[Number, ...], runs: torch.Size) -> Float[Tensor, "runs numbers"]:
    each = [torch.as_tensor(number, dtype=torch.float64).expand(runs) for number in numbers]
    return torch.stack(each, dim=-1).to(torch.float32).reshape(runs.numel(), -1)


def _root(nu: Tensor) -> Tensor:
    """sqrt with a finite slope at 0, where an entry without gradient stays: a step may be differentiated."""
    return nu.add(torch.finfo(nu.dtype).tiny).sqrt_()


def _for_leaf(number: Number, leaf: Tensor) -> Number:
    """In the leaf's dtype, as a mapped number would promote it to its own; of each run, with the leaf's axes."""
    return as_wide_as(leaf, number.to(leaf.dtype) if isinstance(number, Tensor) else number)


def has_decay(name: str) -> bool:
    """True if weight decay acts on the leaf of this dotted name."""
    return not name.endswith("norm")


def is_backbone(name: str) -> bool:
    """True if the leaf of this dotted name is neither an expert's nor the router's."""
    return ".moe." not in name and not name.startswith("router")


def global_norm(grads: Any, axes: int = 0) -> Float[Tensor, "*runs"]:
    """Euclidean norm over all leaves together, of each run if there are `axes` of runs in front of every leaf."""
    norms = [torch.linalg.vector_norm(g, dim=tuple(range(axes, g.ndim))) for g in leaves(grads)]
    return torch.linalg.vector_norm(torch.stack(norms, dim=-1), dim=-1)


def clip_factor(norm: Float[Tensor, "*runs"], max_norm: Number) -> Float[Tensor, "*runs"]:
    """min(1, max_norm / norm): the factor of the gradients."""
    # With a Python number, a tensor of no axes gets a float64 tangent (torch 2.13), which float32 operations refuse.
    most, tiny = (as_scalar(n, norm.device, norm.dtype) for n in (max_norm, 1e-6))
    return (most / (norm + tiny)).clamp_max(1.0)


def schedule(step: Int[Tensor, "*runs"], hyper: HyperParams) -> Float[Tensor, "*runs"]:
    """Share of the peak learning rate at a step: linear warm-up, then a decay to `min_lr_ratio` at `total_steps`.

    warm = min(1, (step + 1) / warmup_steps); without `total_steps` (0) the rate stays at its peak. The decay is a
    cosine after the warm-up, or with `decay_steps` a line over that many last steps, none of them the warm-up's
    (warmup-stable-decay: Hu et al. 2024, arXiv 2404.06395).
    """
    at = step.to(number_dtype(step.device))  # as Python's own numbers
    warmup, total, decay = (
        as_scalar(n, at.device, at.dtype) for n in (hyper.warmup_steps, hyper.total_steps, hyper.decay_steps)
    )
    warm = ((at + 1) / warmup.clamp_min(1)).clamp_max(1.0)
    is_linear = decay > 0
    start = torch.where(is_linear, torch.maximum(total - decay, warmup), warmup)
    progress = ((at - start) / (total - start).clamp_min(1)).clamp(0.0, 1.0)
    left = torch.where(is_linear, 1 - progress, 0.5 * (1 + torch.cos(math.pi * progress)))
    decayed = hyper.min_lr_ratio + (1 - hyper.min_lr_ratio) * left
    return warm * torch.where(total > 0, decayed, 1.0)
