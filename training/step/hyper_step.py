"""The hyper step: (state, batch) -> (state, metrics), two systems at two speeds from one forward and one backward."""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.ops import as_wide_as, wide_dtype
from tiny_onn_func.params import init_params
from tiny_onn_func.primitives.grouped import dense_matmul
from tiny_onn_func.primitives.vmap import outside_vmap_tree
from tiny_onn_func.tree import Tree, leaves, merge, partition, tree_map
from training.step import metrics as measure
from training.step.batch import Batch
from training.step.counter_rng import Purpose, random_words
from training.step.gradients import gradients
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams, Number, is_off
from training.step.main_pass import WHOLE, BatchShard, HooksFactory, PassResult, main_gradients
from training.step.metrics import Metrics, step_metrics
from training.step.optim import AdamWState, adamw_init, adamw_update, clip_factor, global_norm, schedule
from training.step.regenerate import regenerate
from training.step.router_loss import RouterLoss, Targets, router_loss, router_targets, shuffled
from training.step.sums import Sums, sums_of
from training.step.surprise import SurpriseKind, divide_by_expert_mean


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Tree
    expert_opt: AdamWState  # over everything but the router
    router_opt: AdamWState  # over the router's matrix, and its thresholds where they are learned
    step: Tensor  # () int64, or (runs)


def init_state(config: ModelConfig, generator: Generator) -> TrainState:
    """Fresh parameters and optimizers; the same generator state gives the same bits."""
    return state_of(init_params(config, generator), config)


def state_of(params: Tree, config: ModelConfig) -> TrainState:
    """Step 0 from these parameters, with fresh optimizers."""
    fast, router = partition(params)
    step = torch.zeros((), dtype=torch.int64, device=leaves(params)[0].device)
    return TrainState(params, adamw_init(fast), adamw_init(_learned(router, config)), step)


def hyper_step(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    *,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of both systems; pure: the inputs stay untouched and nothing is left behind.

    The experts and all else learn the mean main loss; the router learns which of the experts that a token visited was
    least surprised. Runs under `vmap(lambda s, h: hyper_step(s, batch, h, config))` over stacked states and hypers.

    Args:
        kind: what surprise is, see `training.step.surprise`; static, as it decides which hooks there are.
        compute_dtype: what everything but the router computes in, such as bfloat16; None is the parameters' own dtype.
            Parameters, moments, router, surprise and losses stay as wide as they are.
        teacher_logits: with `hyper.distill_alpha` the main loss, and so surprise, is the mixture of cross entropy and
            distillation; the metric `main_loss` stays the cross entropy.
    """
    given = state, batch, hyper, teacher_logits
    return outside_vmap_tree(lambda given: _step(given, config, kind, compute_dtype), given)


def _step(
    given: tuple[TrainState, Batch, HyperParams, Tensor | None], config: ModelConfig, kind: SurpriseKind,
    compute_dtype: torch.dtype | None,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Of one run, or of several, with an axis of runs in front of every tensor."""
    state, batch, hyper, teacher_logits = given
    part = run_pass(
        state, batch, hyper, config, kind=kind, compute_dtype=compute_dtype, teacher_logits=teacher_logits
    )  # fmt: skip
    router_grads, loss = router_gradients(state, part, part.sums, hyper, config)
    fast, _ = partition(state.params)
    grad_norm = global_norm(part.grads, state.step.ndim) / part.sums.targets.clamp_min(1)
    fast, expert_opt = update_experts(fast, part.grads, state.expert_opt, grad_norm, part.sums, state.step, hyper)
    new, measured = update_router(state, fast, expert_opt, router_grads, loss, part.sums, hyper, config)
    return new, measured._replace(grad_norm=grad_norm)


# The parts of a step --------------------------------------------------------------------------------------------------


class ShardResult(NamedTuple):
    """What a step sees in a batch, or in some rows of one: gradients and sums of parts add up to those of the whole."""

    grads: Tree  # of the summed main loss in the fast parameters
    router_grads: Tree | None  # in the router, where `hyper.router_coupling` lets the main loss in
    seen: PassResult
    targets: Targets
    real: Bool[Tensor, "*runs tokens"]
    sums: Sums


def run_pass(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    *,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    share: BatchShard = WHOLE,
    hooks_factory: HooksFactory = SurpriseHookManager,
) -> ShardResult:
    """The step's one forward and one backward pass; `share` and `hooks_factory` are for who has a part of a batch."""
    (grads, router_grads), seen = main_gradients(
        state.params, batch, hyper, config, state.step, kind, compute_dtype, teacher_logits, share=share,
        hooks_factory=hooks_factory,
    )  # fmt: skip
    real = rearrange(batch.attention_mask != 0, "... b s -> ... (b s)")
    targets = _targets(seen.per_token_surprise, real, hyper, state.step)
    return ShardResult(grads, router_grads, seen, targets, real, sums_of(seen, targets, real))


def router_gradients(
    state: TrainState, part: ShardResult, sums: Sums, hyper: HyperParams, config: ModelConfig
) -> tuple[Tree, RouterLoss]:
    """The router's gradient and loss, of which a part has its share; `sums` are those of the whole batch."""
    learned = _learned(partition(state.params)[1], config)
    load = measure.shares(sums.routed)
    annealed = _annealed(hyper, state.step)

    def objective(learned: Tree, given: Any) -> tuple[Tensor, RouterLoss]:
        """The router is linear in detached inputs: its gradient needs no second pass through the model."""
        router, (inputs, targets, load, real, hyper, informative, tokens) = learned["router"], given
        dtype = wide_dtype(router.dtype)
        logits = dense_matmul(inputs.to(dtype), router.to(dtype))
        loss = router_loss(logits, targets, load, real, hyper, informative=informative, tokens=tokens)
        return loss.total, loss

    inputs = part.seen.trace.router_inputs.detach()
    given = inputs, part.targets, load, part.real, annealed, sums.informative, sums.real
    (grads,), loss = gradients(objective, (learned,), given)
    if part.router_grads is not None:
        main, targets_count = _learned(part.router_grads, config), sums.targets.clamp_min(1)
        grads = {name: grad + main[name] / as_wide_as(grad, targets_count) for name, grad in grads.items()}
    return grads, loss


def update_experts(
    fast: Tree, grads: Tree, optimizer: AdamWState, grad_norm: Tensor, sums: Sums, step: Tensor, hyper: HyperParams
) -> tuple[Tree, AdamWState]:
    """One step of everything but the router, from gradients of the summed loss and the norm of those of the mean."""
    scale = clip_factor(grad_norm, hyper.max_grad_norm) / sums.targets.clamp_min(1)
    return adamw_update(
        fast, grads, optimizer, lr=hyper.lr * schedule(step, hyper), weight_decay=hyper.weight_decay, hyper=hyper,
        grad_scale=scale, backbone_scale=hyper.backbone_lr_scale,
    )  # fmt: skip


def update_router(
    state: TrainState,
    fast: Tree,
    expert_opt: AdamWState,
    router_grads: Tree,
    loss: RouterLoss,
    sums: Sums,
    hyper: HyperParams,
    config: ModelConfig,
) -> tuple[TrainState, Metrics]:
    """The router's step, and with it the new state and the metrics, but for `grad_norm`."""
    router = partition(state.params)[1]
    rate, learning, load = schedule(state.step, hyper), _while_learning(state.step, hyper), measure.shares(sums.routed)
    router_grad_norm = global_norm(router_grads, state.step.ndim)
    learned, router_opt = adamw_update(
        _learned(router, config), router_grads, state.router_opt, lr=hyper.router_lr * rate * learning,
        weight_decay=0.0, hyper=hyper, grad_scale=clip_factor(router_grad_norm, hyper.max_grad_norm),
    )  # fmt: skip
    slow = {**router["layers"]["moe"], **learned}
    slow["router_bias"] = balanced_bias(slow["router_bias"], load, hyper.bias_speed * learning)
    params = tree_map(lambda _, leaf: leaf, state.params, merge(fast, {"layers": {"moe": slow}}))  # in the order it had
    new = TrainState(params, expert_opt, router_opt, state.step + 1)
    if not is_off(hyper.regenerate_below):
        new = new._replace(**regenerate(*new, load=load, hyper=hyper))
    measured = step_metrics(sums, loss, hyper)
    return new, measured._replace(router_grad_norm=router_grad_norm, lr=(hyper.lr * rate).to(router_grad_norm.dtype))


def balanced_bias(
    bias: Tensor, load: Float[Tensor, "*runs layers experts"], speed: Number
) -> Float[Tensor, "*runs layers experts"]:
    """bias + speed * sign(mean load - load): over-used experts sink (loss-free balancing, arXiv 2408.15664)."""
    return bias + (as_wide_as(load, speed) * (load.mean(dim=-1, keepdim=True) - load).sign()).to(bias.dtype)


def _targets(surprise: Tensor, real: Tensor, hyper: HyperParams, step: Tensor) -> Targets:
    """What surprise asks of the router in this step."""
    if not is_off(hyper.expert_norm):
        surprise = divide_by_expert_mean(surprise, hyper.expert_norm)
    targets = router_targets(
        surprise, real, hyper.min_candidates, hyper.surprise_sign, hyper.target_temperature
    )  # fmt: skip
    if is_off(hyper.shuffle_targets):
        return targets
    words = random_words(hyper.explore_seed, step, Purpose.SHUFFLE, *targets.expert.shape[-2:])
    return shuffled(targets, words, hyper.shuffle_targets)


def _while_learning(step: Tensor, hyper: HyperParams) -> Number:
    """1 while the router learns, 0 from its `freeze_step` on."""
    if is_off(hyper.freeze_step):
        return 1.0
    last = torch.as_tensor(hyper.freeze_step, device=step.device)
    return ((step < last) | (last <= 0)).to(torch.float64)


def _annealed(hyper: HyperParams, step: Tensor) -> HyperParams:
    """With the weight of surprise that this step has."""
    if is_off(hyper.surprise_until):
        return hyper
    until = torch.as_tensor(hyper.surprise_until, device=step.device)
    share = torch.where(until > 0, (1 - step / until.clamp_min(1)).clamp_min(0), 1.0)
    return hyper._replace(surprise_weight=hyper.surprise_weight * share)


def _learned(router: Tree, config: ModelConfig) -> dict[str, Any]:
    """The router's leaves that follow a gradient; the selection bias follows the load, unless it is a threshold."""
    names = ("router", "router_bias") if config.routing == "thresholds" else ("router",)
    return {name: router["layers"]["moe"][name] for name in names}
