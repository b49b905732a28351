"""Kernel of all that follows the pass in a hyper step: the router's loss and gradient, both updates, the metrics."""

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tiny_onn_func.kernels.runtime import SIZE, addresses, check, check_leaves, loaded, refuse, threads

F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool
SIZES = "runs", "layers", "tokens", "hidden", "experts", "slots", "leaves", "threads"
NUMBERS = (  # of HyperParams, as C reads them
    "lr", "router_lr", "backbone_lr_scale", "weight_decay", "beta1", "beta2", "eps", "max_grad_norm", "warmup_steps",
    "total_steps", "decay_steps", "min_lr_ratio", "surprise_weight", "balance_weight", "z_weight", "bias_speed",
    "freeze_step", "surprise_until", "pi_alpha", "pi_gamma",
)  # fmt: skip
METRICS = (  # as C numbers them
    "main_loss", "distill_loss", "router_loss", "main_acc", "gating_acc", "gating_trivial", "surprise", "tau",
    "pi_score", "avg_k", "max_vio", "dead_experts", "tie_rate", "balance_loss", "z_loss", "grad_norm",
    "router_grad_norm", "lr",
)  # fmt: skip
BACKBONE, DECAYS = 1, 2  # of a leaf, added up


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, SIZE) for name in SIZES)


class Moments(NamedTuple):
    """Leaves by dotted name, each (*runs, ...), and their running moments."""

    params: dict[str, Tensor]
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]


class Observed(NamedTuple):
    """Results of the pass and of the rule, which the update reads."""

    surprise: Float[Tensor, "*runs layers tokens experts"]
    router_inputs: Float[Tensor, "*runs layers tokens dim"]
    router_logits: Float[Tensor, "*runs layers tokens experts"]
    expert_ids: Int64[Tensor, "*runs layers tokens slots"]
    active: Bool[Tensor, "*runs layers tokens slots"]
    target: Int64[Tensor, "*runs layers tokens"]
    informative: Bool[Tensor, "*runs layers tokens"]
    tied: Bool[Tensor, "*runs layers tokens"]
    real: Bool[Tensor, "*runs tokens"]
    loss_sum: Float[Tensor, "*runs"]
    entropy_sum: Float[Tensor, "*runs"]
    targets: Int64[Tensor, "*runs"]
    correct: Int64[Tensor, "*runs"]


class Finished(NamedTuple):
    """The new leaves and moments, the router among them, and the metrics of the step."""

    leaves: Moments
    bias: Float[Tensor, "*runs layers experts"]
    metrics: Float[Tensor, "metrics *runs"]  # METRICS
    by_expert: Float[Tensor, "3 *runs layers experts"]  # load, target_load, expert_surprise


def finish_step(
    observed: Observed,
    grads: Mapping[str, Float[Tensor, "..."]],
    fast: Moments,
    router: Moments,
    bias: Float[Tensor, "*runs layers experts"],
    numbers: Float64[Tensor, "*runs numbers"],
    counters: tuple[Int64[Tensor, "*runs"], Int64[Tensor, "*runs"], Int64[Tensor, "*runs"]],
    kinds: Mapping[str, int],
) -> Finished:
    """The router's gradient, AdamW of the fast leaves and of the router, the selection bias, and the metrics.

    Args:
        grads: of the summed loss in the fast leaves.
        fast, router: leaves before the update; those of the router are one, of any name.
        bias: the router's selection bias.
        numbers: those of NUMBERS, in that order.
        counters: the step, and the updates that the fast leaves and the router have had.
        kinds: of each fast leaf, BACKBONE + DECAYS, or one of them, or 0.

    Raises:
        ValueError: a tensor of another shape or dtype.
        IndexError: a target that is no expert, of a token that teaches; or an active slot's expert that is none.
    """
    *runs, layers, tokens, experts = observed.router_logits.shape
    slots, hidden = observed.expert_ids.shape[-1], observed.router_inputs.shape[-1]
    if len(runs) > 1 or not observed.router_logits.numel():
        shape = tuple(observed.router_logits.shape)
        raise ValueError(f"finish_step: expected router_logits of tokens, and one axis of runs at most, got {shape}")
    by_layer = (layers, *runs, tokens) if runs else (layers, tokens)
    wanted = _shapes(by_layer, experts, slots, hidden)
    laid_out = [t.transpose(0, 1) if runs else t for t in observed[:8]] + list(observed[8:])
    for name, t, (shape, dtype) in zip(Observed._fields, laid_out, wanted, strict=True):
        if t.shape != shape or t.dtype is not dtype or not t.is_cpu:
            check("finish_step", **{name: (t, shape, dtype)})
    check("finish_step", bias=(bias, (*runs, layers, experts), F32), numbers=(numbers, (*runs, len(NUMBERS)), F64))
    check("finish_step", **{f"counter {i}": (t, tuple(runs), I64) for i, t in enumerate(counters)})
    if len(router.params) != 1 or any(name not in kinds for name in fast.params):
        raise ValueError(f"finish_step: expected one leaf of the router and every kind, got {list(router.params)}")
    shapes = {name: t.shape for name, t in fast.params.items()}
    (own,) = router.params
    of_router = {own: (*runs, layers, hidden, experts)}
    for tree, leaves in zip(("parameters", "mu", "nu"), fast, strict=True):
        check_leaves("finish_step", tree, leaves, shapes)
    check_leaves("finish_step", "gradients", grads, shapes)
    for tree, leaves in zip(("parameters", "mu", "nu"), router, strict=True):
        check_leaves("finish_step", f"the router's {tree}", leaves, of_router)
    if any(tuple(shape[: len(runs)]) != tuple(runs) for shape in shapes.values()):
        raise ValueError(f"finish_step: expected leaves with {runs} runs in front, got others")
    names = [*shapes, own]
    read = [
        [tree[0][name].contiguous() for name in shapes] + [tree[1][own].contiguous()]
        for tree in zip(fast, router, strict=True)
    ]
    slopes = [grads[name].contiguous() for name in shapes]
    new = [[torch.empty_like(t) for t in leaves] for leaves in read]
    grad_router, new_bias = torch.empty_like(read[0][-1]), torch.empty_like(bias, memory_format=torch.contiguous_format)
    metrics, by_expert = torch.empty(len(METRICS), *runs), torch.empty(3, *runs, layers, experts)
    count = runs[0] if runs else 1
    sizes = _Sizes(count, layers, tokens, hidden, experts, slots, len(names), threads())
    inputs = [t.contiguous() for t in (*laid_out, numbers, *counters, bias)]
    sized = (SIZE * len(names))(*[t.numel() // count for t in read[0]])
    decided = (SIZE * len(names))(*[kinds[name] for name in shapes], DECAYS)
    trees = [addresses(leaves) for leaves in (read[0], [*slopes, grad_router], read[1], read[2], *new)]
    arrays: list[ctypes.Array[Any]] = [sized, decided, *trees]
    at_trees = (ctypes.c_void_p * len(arrays))(*[ctypes.addressof(array) for array in arrays])
    outputs = addresses([grad_router, new_bias, metrics, *by_expert])
    if code := loaded().finish_step(ctypes.byref(sizes), addresses(inputs), at_trees, outputs):
        outside = f"target in [0, {experts}) where informative, and expert_ids in that range where active"
        refuse("finish_step", code, outside, "one step's sums, got none")
    return Finished(Moments(*(dict(zip(names, leaves, strict=True)) for leaves in new)), new_bias, metrics, by_expert)


@cache
def _shapes(
    by_layer: tuple[int, ...], experts: int, slots: int, hidden: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each field of Observed, the axis of layers in front."""
    _, *runs, tokens = by_layer
    by_expert, by_slot, sums = (*by_layer, experts), (*by_layer, slots), tuple(runs)
    return (
        (by_expert, F32), ((*by_layer, hidden), F32), (by_expert, F32), (by_slot, I64), (by_slot, BOOL),
        (by_layer, I64), (by_layer, BOOL), (by_layer, BOOL), ((*runs, tokens), BOOL), (sums, F32), (sums, F32),
        (sums, I64), (sums, I64),
    )  # fmt: skip
