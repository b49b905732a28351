"""AdamW as a pair of pure functions, clipping, and the learning-rate schedule."""

import math
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.tree import Tree, flatten, leaves, tree_map, unflatten
from training.differentiate import is_transformed
from training.hyper import HyperParams, Number


class AdamWState(NamedTuple):
    """Number of updates made, and the running moments of the gradient; `mu` and `nu` have the parameters' structure."""

    updates: Tensor  # () int64
    mu: Tree
    nu: Tree


def adamw_init(params: Tree) -> AdamWState:
    """No update made yet, moments zero."""
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

    Decay acts on matrices; norms, one number a channel, have none. PyTorch's fused kernel makes the step
    where no transform, no autograd and no mapped number asks for the formula itself. `backbone_scale` multiplies the
    rate, and so the decay, of every leaf that is no expert's.
    """
    updates = state.updates + 1
    if _may_fuse((params, grads, lr, weight_decay, hyper, grad_scale), weight_decay, hyper):
        rates = {True: float(lr * backbone_scale), False: float(lr)}
        return _fused_update(params, grads, state._replace(updates=updates), rates, weight_decay, hyper, grad_scale)
    t = updates.to(torch.float64)  # as Python's own numbers: in float32 the corrections would lose half of their digits
    step_size = lr / (1 - hyper.beta1**t)
    root_correction = (1 - hyper.beta2**t).sqrt()
    p, g, mu, nu = (flatten(tree) for tree in (params, grads, state.mu, state.nu))
    new_p: dict[str, Tensor] = {}
    # step / (sqrt(nu) / root + eps) = (step root) / (sqrt(nu) + eps root): one pass less over each leaf
    numbers = grad_scale, 1 - hyper.beta1, 1 - hyper.beta2, hyper.eps * root_correction
    steps = {
        backbone: (1 - lr * share * weight_decay, step_size * share * root_correction)
        for backbone, share in ((True, backbone_scale), (False, 1.0))
    }
    for name, value in p.items():
        own = (*numbers, *steps[is_backbone(name)])
        scale, new_in_mu, new_in_nu, eps, decay, step = (_in_dtype(number, value) for number in own)
        grad = g[name] * scale
        mu[name] = torch.lerp(mu[name], grad, new_in_mu)
        nu[name] = torch.lerp(nu[name], grad.square(), new_in_nu)
        update = mu[name] / (_root(nu[name]) + eps)
        decayed = value * decay if has_decay(name) else value
        new_p[name] = decayed - step * update
    return unflatten(new_p), AdamWState(updates, unflatten(mu), unflatten(nu))


def _may_fuse(reads: Any, weight_decay: Number, hyper: HyperParams) -> bool:
    """Whether nobody watches the step, and what the kernel takes as Python numbers is given so."""
    numbers = (weight_decay, hyper.beta1, hyper.beta2, hyper.eps)
    return not is_transformed(reads) and all(isinstance(number, float | int) for number in numbers)


def _fused_update(
    params: Tree, grads: Tree, state: AdamWState, rates: dict[bool, float], weight_decay: Number, hyper: HyperParams,
    scale: Number,
) -> tuple[Tree, AdamWState]:  # fmt: skip
    """The same step, each leaf read and written once; it works in place, on copies."""
    plain = torch.contiguous_format  # the kernel reads all four as if their strides were the same
    p, mu, nu = (
        {k: v.clone(memory_format=plain) for k, v in flatten(tree).items()} for tree in (params, state.mu, state.nu)
    )
    g = {name: (grad * scale).contiguous() for name, grad in flatten(grads).items()}
    updates = state.updates.to(torch.float32)
    beta1, beta2, eps, decays = float(hyper.beta1), float(hyper.beta2), float(hyper.eps), float(weight_decay)

    def kind(name: str) -> tuple[bool, bool]:
        return has_decay(name), is_backbone(name) and rates[True] != rates[False]

    for (decay, backbone), group in groupby(sorted(p, key=kind), key=kind):
        names = list(group)
        torch._fused_adamw_(
            [p[n] for n in names], [g[n] for n in names], [mu[n] for n in names], [nu[n] for n in names], [],
            [updates] * len(names), lr=rates[backbone], beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=decays if decay else 0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
    return unflatten(p), AdamWState(state.updates, unflatten(mu), unflatten(nu))


def _root(nu: Tensor) -> Tensor:
    """sqrt, with a finite slope at 0, where an entry without gradient stays, for who differentiates a step."""
    return nu.add(torch.finfo(nu.dtype).tiny).sqrt_()


def _in_dtype(number: Number, leaf: Tensor) -> Number:
    """A mapped number has an axis, and would promote the leaf to its own dtype."""
    return number.to(leaf.dtype) if isinstance(number, Tensor) else number


def has_decay(name: str) -> bool:
    """Whether weight decay acts on the leaf of this dotted name."""
    return not name.endswith("norm")


def is_backbone(name: str) -> bool:
    """Whether the leaf of this dotted name is neither an expert's nor the router's."""
    return ".moe." not in name and not name.startswith("router")


def global_norm(grads: Any) -> Float[Tensor, ""]:
    """Euclidean norm over all leaves together."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in leaves(grads)]))


def clip_factor(norm: Tensor, max_norm: Number) -> Float[Tensor, ""]:
    """min(1, max_norm / norm): what to multiply gradients with."""
    return (max_norm / (norm + 1e-6)).clamp_max(1.0)


def schedule(step: Tensor, hyper: HyperParams) -> Float[Tensor, ""]:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to `min_lr_ratio` at `total_steps`.

    warm = min(1, (step + 1) / warmup_steps); without `total_steps` (0) the rate stays at its peak.
    """
    at = step.to(torch.float64)  # as Python's own numbers
    warmup, total = (
        torch.as_tensor(n, device=at.device, dtype=at.dtype) for n in (hyper.warmup_steps, hyper.total_steps)
    )
    warm = ((at + 1) / warmup.clamp_min(1)).clamp_max(1.0)
    progress = ((at - warmup) / (total - warmup).clamp_min(1)).clamp(0.0, 1.0)
    cosine = hyper.min_lr_ratio + (1 - hyper.min_lr_ratio) * 0.5 * (1 + torch.cos(math.pi * progress))
    return warm * torch.where(total > 0, cosine, 1.0)
