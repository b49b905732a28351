"""The pass and the update of a hyper step as one kernel each, where nothing needs their parts.

No hooks and no rules that look inside, and no derivatives of the step: float32 on a CPU, and the settings that the two
kernels know. Whatever they do not know is left to the parts, which define what they compute.
"""

from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float64
from torch import Tensor

from tiny_onn_func.checks import check_indices, check_mask
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels.decoder import IGNORE_INDEX, SETTINGS, DecoderPass, Measured, decoder_pass
from tiny_onn_func.kernels.update import BACKBONE, DECAYS, METRICS, NUMBERS, Finished, Moments, Observed, finish_step
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import as_scalar, rotary_angles
from tiny_onn_func.params import check_params
from tiny_onn_func.primitives.vmap import drop_repeated_axes
from tiny_onn_func.routing import check_budget
from tiny_onn_func.tree import Tree, flatten, merge, unflatten
from training.step.batch import Batch
from training.step.hyper_params import HyperParams, is_off
from training.step.optim import AdamWState, has_decay, is_backbone
from training.step.rules import Targets
from training.step.surprise import DOT, W2, Kind

MEASURED: dict[tuple[Any, ...], Measured] = {(): "nothing", (W2,): "norms", (DOT,): "dots"}  # by a kind's hook points


def pass_is_one_kernel(
    fast: Tree, router: Tree, batch: Batch, hyper: HyperParams, config: ModelConfig, kind: Kind
) -> bool:
    """True if the kernel computes this pass: float32 on a CPU, top-k or budget routing by logits, a decoupled router.

    Hooks of others, a teacher, exploration and a dtype of its own are the caller's to look for.
    """
    if not _knows(config, SETTINGS) or kind.points not in MEASURED or not is_off(hyper.router_coupling):
        return False
    runs = fast["embed_tokens"].ndim - 2
    if runs not in (0, 1) or batch.input_ids.ndim != 2 + runs or not batch.input_ids.numel():
        return False
    numbers = [hyper.pi_alpha] if isinstance(hyper.pi_alpha, Tensor) else []
    whole = batch.attention_mask.dtype in (torch.int64, torch.bool) and batch.input_ids.dtype == torch.int64
    whole = whole and batch.input_ids.layout is torch.strided
    leaves = [leaf for tree in (fast, router) for leaf in flatten(tree).values()]
    return whole and runtime.usable_now(*leaves) and runtime.is_untracked(*numbers, *batch)


def kernel_pass(
    fast: Tree, router: Tree, batch: Batch, hyper: HyperParams, config: ModelConfig, kind: Kind
) -> tuple[Tree, DecoderPass, RouterTrace]:
    """(gradients of the summed main loss in `fast`, what was observed, the trace) of a pass that `pass_is_one_kernel`.

    Raises:
        ValueError, IndexError: as `forward` and `cross_entropy`.
    """
    check_budget(hyper.pi_alpha)
    *runs, _, seq = batch.input_ids.shape
    mask = batch.attention_mask if batch.attention_mask.dtype == torch.int64 else batch.attention_mask.to(torch.int64)
    masks = drop_repeated_axes(mask, 2)
    masks = masks if masks.ndim == 3 else masks[None]
    budgets = as_scalar(hyper.pi_alpha, mask.device, torch.float32).to(torch.float64).expand(runs)
    try:
        observed = decoder_pass(
            flatten(fast) | flatten(router), batch.input_ids, batch.labels, masks, budgets,
            _angles(seq, config.head_dim, config.rope_theta), config=config, measured=MEASURED[kind.points],
        )  # fmt: skip
    except (ValueError, IndexError):  # in the words of the parts
        check_params(merge(fast, router), config, runs)
        check_indices("input_ids", batch.input_ids, 0, config.vocab_size)
        check_mask("attention_mask", batch.attention_mask, batch.input_ids.shape)
        check_indices("labels", batch.labels, 0, config.vocab_size, ignore=IGNORE_INDEX)
        raise
    if not kind.points:
        observed.surprise.fill_(torch.inf)
    trace = observed.router_inputs, observed.router_logits, observed.expert_ids, observed.weights, observed.active
    return unflatten(observed.grads), observed, RouterTrace(*trace)


@cache
def _angles(seq: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(seq), head_dim, theta)


# The update -----------------------------------------------------------------------------------------------------------

# Coefficients that the pass and the rule read, or the kernel; all others must be as they are by default.
OF_PASS_AND_RULE = frozenset({
    "distill_alpha", "distill_temperature", "min_candidates", "surprise_sign", "target_temperature", "expert_norm",
    "shuffle_targets", "router_coupling", "explore_prob", "explore_seed",
})  # fmt: skip
OTHERS = tuple(
    (place, HyperParams._field_defaults[name])
    for place, name in enumerate(HyperParams._fields)
    if name not in OF_PASS_AND_RULE.union(NUMBERS)
)
# Settings of the model that only the pass reads, or both; all others must be as they are by default.
SETTINGS_OF_PASS = (
    "ngram_order", "ngram_buckets", "value_embeddings", "token_bias", "logit_softcap",
    "shared_expert_intermediate_size",
)  # fmt: skip
ROUTER, BIAS = "layers.moe.router", "layers.moe.router_bias"


def update_is_one_kernel(
    fast: Tree,
    router: Tree,
    grads: Tree,
    optimizers: tuple[AdamWState, AdamWState],
    observed: Any,
    targets: Targets,
    hyper: HyperParams,
    config: ModelConfig,
) -> bool:
    """True if the kernel computes this update: float32 on a CPU, a router that learns hard targets by its matrix alone.

    A teacher and the main loss's gradient in the router are the caller's to look for.
    """
    if (
        not _knows(config, SETTINGS + SETTINGS_OF_PASS)
        or targets.shares is not None
        or fast["embed_tokens"].ndim not in (2, 3)
    ):
        return False
    if any(isinstance(hyper[at], Tensor) or hyper[at] != default for at, default in OTHERS):
        return False
    moments = [tree for state in optimizers for tree in (state.mu, state.nu)]
    leaves = [leaf for tree in (fast, router, grads, *moments) for leaf in flatten(tree).values()]
    measured = observed.per_token_surprise, observed.trace.router_logits, observed.trace.router_inputs
    numbers = [number for number in hyper if isinstance(number, Tensor)]
    return runtime.usable_now(*leaves, *measured, observed.lm.loss_sum) and runtime.is_untracked(*numbers)


def kernel_update(
    fast: Tree,
    router: Tree,
    grads: Tree,
    optimizers: tuple[AdamWState, AdamWState],
    step: Tensor,
    observed: Any,
    targets: Targets,
    batch: Batch,
    hyper: HyperParams,
) -> tuple[Tree, tuple[AdamWState, AdamWState], dict[str, Tensor]]:
    """(new parameters, new optimizers, metrics by name) of an update that `update_is_one_kernel`."""
    lm, trace = observed.lm, observed.trace
    flat, flat_router = flatten(fast), flatten(router)
    real = rearrange(batch.attention_mask != 0, "... b s -> ... (b s)")
    tied = torch.zeros_like(targets.informative) if targets.tied is None else targets.tied
    seen = Observed(
        observed.per_token_surprise, trace.router_inputs, trace.router_logits, trace.expert_ids, trace.active,
        targets.expert, targets.informative, tied, real.expand(*step.shape, -1), lm.loss_sum, lm.entropy_sum,
        lm.targets, lm.correct,
    )  # fmt: skip
    of_fast, of_router = optimizers
    finished = finish_step(
        seen, flatten(grads), Moments(flat, flatten(of_fast.mu), flatten(of_fast.nu)),
        Moments({"router": flat_router[ROUTER]}, of_router.mu, of_router.nu), flat_router[BIAS],
        _numbers(hyper, step), (step, of_fast.updates, of_router.updates), _kinds(tuple(flat)),
    )  # fmt: skip
    new, mu, nu = finished.leaves
    own = {name: tree.pop("router") for name, tree in zip(Moments._fields, finished.leaves, strict=True)}
    new_fast = AdamWState(of_fast.updates + 1, unflatten(mu), unflatten(nu))
    new_router = AdamWState(of_router.updates + 1, {"router": own["mu"]}, {"router": own["nu"]})
    merged = _in_order(new, {ROUTER: own["params"], BIAS: finished.bias})
    return unflatten(merged), (new_fast, new_router), _metrics(finished, observed)


def _in_order(fast: dict[str, Tensor], router: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves in the order of the spec: the router's are the first of their dict."""
    merged: dict[str, Tensor] = {}
    for name, leaf in fast.items():
        if name.startswith("layers.moe.") and ROUTER not in merged:
            merged |= router
        merged[name] = leaf
    return merged


def _metrics(finished: Finished, observed: Any) -> dict[str, Tensor]:
    load, target_load, expert_surprise = finished.by_expert.unbind(0)
    return dict(
        zip(METRICS, finished.metrics.unbind(0), strict=True), nonfinite_surprise=observed.nonfinite,
        expert_load=load, target_load=target_load, expert_surprise=expert_surprise,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _kinds(names: tuple[str, ...]) -> dict[str, int]:
    return {name: BACKBONE * is_backbone(name) + DECAYS * has_decay(name) for name in names}


def _numbers(hyper: HyperParams, step: Tensor) -> Float64[Tensor, "*runs numbers"]:
    """The coefficients that the kernel reads, of each run."""
    each: list[Any] = [getattr(hyper, name) for name in NUMBERS]
    plain = torch.tensor([0.0 if isinstance(n, Tensor) else float(n) for n in each], dtype=torch.float64)
    if not step.ndim and not any(isinstance(n, Tensor) for n in each):
        return plain
    table = plain.repeat(*step.shape, 1) if step.ndim else plain
    for place, number in enumerate(each):
        if isinstance(number, Tensor):
            table[..., place] = number
    return table


@cache
def _knows(config: ModelConfig, settings: tuple[Any, ...]) -> bool:
    """True if the experts are the router's choice, and all settings but these are as they are by default."""
    others = [field for field in fields(config) if field.name not in settings]
    return config.routing in ("router", "token") and all(getattr(config, f.name) == f.default for f in others)
