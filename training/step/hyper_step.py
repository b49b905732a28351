"""The hyper step: (state, batch) -> (state, metrics), two systems at two speeds from one forward and one backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.moe import linear_router_logits
from tiny_onn_func.ops import as_scalar, as_wide_as
from tiny_onn_func.params import check_params, init_params
from tiny_onn_func.primitives.vmap import outside_vmap_tree
from tiny_onn_func.routing import gated
from tiny_onn_func.tree import Tree, leaves, merge, number_dtype, partition, to_device, tree_map
from training.ranges import out_of_range
from training.step.batch import Batch
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import RANGES, HyperParams, Number, is_off, not_a_number, with_axes
from training.step.main_pass import (
    WHOLE,
    BatchShard,
    HooksFactory,
    PassResult,
    StepOptions,
    gradients,
    main_gradients,
)
from training.step.metrics import Metrics, shares, step_metrics
from training.step.one_kernel import kernel_update, update_is_one_kernel
from training.step.optim import AdamWState, adamw_init, adamw_update, clip_factor, global_norm, schedule
from training.step.regenerate import regenerate
from training.step.router_loss import RouterLoss, router_loss
from training.step.router_state import moved_leaves, with_router_sums
from training.step.rules import LEAST_SURPRISE, Rule, Targets, apply_rule
from training.step.sums import Sums, sums_of
from training.step.surprise import SurpriseKind


class TrainState(NamedTuple):
    """State that a run carries from step to step."""

    params: Tree
    expert_opt: AdamWState  # over everything but the router
    router_opt: AdamWState  # over the router's matrix, and its thresholds where they are learned
    step: Tensor  # () int64, or (runs)
    rule: Any = ()  # the rule's own state, a tree of tensors


def init_state(config: ModelConfig, generator: Generator, rule: Rule = LEAST_SURPRISE) -> TrainState:
    """Fresh parameters and optimizers; the same generator state gives the same bits."""
    return state_of(init_params(config, generator), config, rule)


def state_of(params: Tree, config: ModelConfig, rule: Rule = LEAST_SURPRISE) -> TrainState:
    """Step 0 from these parameters, with fresh optimizers and the rule's first state."""
    fast, router = partition(params)
    step = torch.zeros((), dtype=torch.int64, device=leaves(params)[0].device)
    return TrainState(params, adamw_init(fast), adamw_init(_learned(router, config)), step, rule.init(config))


def hyper_step(
    state: TrainState,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    *,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    rule: Rule = LEAST_SURPRISE,
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
        rule: from surprise to the router's targets; the one that `state` was made with.

    Returns:
        The new state, and the metrics of the step, measured before its update.

    Raises:
        ValueError, IndexError: parameters that are not the configuration's, or a batch, a teacher, a kind or a
            coefficient that is out of range or has other axes; the message names it.
    """
    hyper = checked_numbers(state, hyper, config)
    options = StepOptions(kind, compute_dtype)
    inputs = state, batch, hyper, teacher_logits
    return outside_vmap_tree(lambda inputs: _step(*inputs, config=config, options=options, rule=rule), inputs)


def _step(
    state: TrainState, batch: Batch, hyper: HyperParams, teacher_logits: Tensor | None, *, config: ModelConfig,
    options: StepOptions, rule: Rule,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """`hyper_step` of one run, or of several, with an axis of runs in front of every tensor."""
    fast, router = partition(state.params)
    seen = run_pass(state, fast, router, batch, hyper, config, options, rule, teacher_logits)
    grads, router_grads, observed, targets, rule_state = seen
    optimizers = state.expert_opt, state.router_opt
    whole = router_grads is None and (teacher_logits is None or is_off(hyper.distill_alpha))
    if whole and update_is_one_kernel(fast, router, grads, optimizers, observed, targets, hyper, config):
        params, optimizers, metrics = kernel_update(
            fast, router, grads, optimizers, state.step, observed, targets, batch, hyper
        )
        return TrainState(params, *optimizers, state.step + 1, rule_state), Metrics(**metrics)
    result = shard_result(seen, router, batch, hyper, config)
    of_router = router_gradients(router, state.step, result, result.sums, hyper, config)
    return update(state, fast, router, result, *of_router, hyper, config)


def checked_numbers(state: TrainState, hyper: HyperParams, config: ModelConfig) -> HyperParams:
    """The coefficients on the device of the state, where those that are tensors of another are copied to.

    Raises:
        ValueError: coefficients out of range or with axes of their own, or parameters that are not the
            configuration's; the message names the coefficient or the leaf.
    """
    runs = state.step.shape
    if wrong := not_a_number(hyper):
        raise ValueError(f"hyper.{wrong}" if isinstance(hyper, HyperParams) else f"hyper: {wrong}")
    if wrong := out_of_range(hyper, RANGES) or with_axes(hyper, runs):
        raise ValueError(f"hyper.{wrong}")
    check_params(state.params, config, runs)
    device = state.step.device
    away = {
        name: to_device(number, device)
        for name, number in zip(hyper._fields, hyper, strict=True)
        if isinstance(number, Tensor) and number.device != device
    }
    return hyper._replace(**away) if away else hyper


def update(
    state: TrainState, fast: Tree, router: Tree, result: Any, router_grads: Tree, loss: RouterLoss, hyper: HyperParams,
    config: ModelConfig,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Clip and update experts and router from the gradients and sums of a whole batch (`result`)."""
    grad_norm = global_norm(result.grads, state.step.ndim) / result.sums.targets.clamp_min(1)
    fast, expert_opt = update_experts(fast, result.grads, state.expert_opt, grad_norm, result.sums, state.step, hyper)
    new = state._replace(expert_opt=expert_opt, rule=result.rule)
    return update_router(new, fast, router, router_grads, loss, result.sums, grad_norm, hyper, config)


# The parts of a step --------------------------------------------------------------------------------------------------

RunRule = Callable[..., tuple[Any, Targets]]  # (rule, state, surprise, trace, batch, hyper, step) -> (state, targets)


class Pass(NamedTuple):
    """The pass over a batch, or over some rows of one, and the rule's targets for them."""

    grads: Tree  # of the summed main loss in the fast parameters
    router_grads: Tree | None  # in the router, where `hyper.router_coupling` lets the main loss in
    observed: PassResult
    targets: Targets
    rule: Any  # the rule's new state


class ShardResult(NamedTuple):
    """A pass with its sums: gradients and sums of shards add up to those of the whole batch."""

    grads: Tree
    router_grads: Tree | None
    observed: PassResult
    targets: Targets
    rule: Any
    real: Bool[Tensor, "*runs tokens"]
    sums: Sums


def run_pass(
    state: TrainState,
    fast: Tree,
    router: Tree,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    options: StepOptions,
    rule: Rule,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    *,
    shard: BatchShard = WHOLE,
    hooks_factory: HooksFactory = SurpriseHookManager,
    run_rule: RunRule = apply_rule,
) -> Pass:
    """Run the one forward and one backward pass, and the rule on what it gave.

    The last three arguments are for a rank with part of a batch.

    Raises:
        ValueError: `hyper.distill_alpha` asks for a teacher, and there is none.
    """
    alpha = hyper.distill_alpha
    if teacher_logits is None and not isinstance(alpha, Tensor) and alpha > 0:
        raise ValueError(f"teacher_logits: expected some with hyper.distill_alpha of {alpha}, got none")
    (grads, router_grads), observed = main_gradients(
        fast, router, batch, hyper, config, state.step, options, teacher_logits, shard=shard,
        hooks_factory=hooks_factory,
    )  # fmt: skip
    surprise, trace = observed.per_token_surprise, observed.trace
    rule_state, targets = run_rule(rule, state.rule, surprise, trace, batch, hyper, state.step)
    return Pass(grads, router_grads, observed, targets, rule_state)


def shard_result(seen: Pass, router: Tree, batch: Batch, hyper: HyperParams, config: ModelConfig) -> ShardResult:
    """Add up what a pass over these rows gave."""
    real = rearrange(batch.attention_mask != 0, "... b s -> ... (b s)")
    sums = sums_of(seen.observed, seen.targets, real)
    ids, moe = rearrange(batch.input_ids, "... b s -> ... (b s)"), router["layers"]["moe"]
    sums = with_router_sums(sums, seen.observed.trace, ids, real, moe["router_bias"], hyper, config)
    return ShardResult(*seen, real, sums)


def router_gradients(
    router: Tree, step: Tensor, result: ShardResult, sums: Sums, hyper: HyperParams, config: ModelConfig
) -> tuple[Tree, RouterLoss]:
    """The router's gradient and loss, to which a shard adds its part; `sums` are those of the whole batch."""
    trace, learns = result.observed.trace, [config.learns(layer) for layer in range(config.num_hidden_layers)]

    def objective(learned: Tree, inputs: Any) -> tuple[Tensor, RouterLoss]:
        """The router is linear in detached inputs: its gradient needs no second pass through the model."""
        router_inputs, fixed, *rest = inputs
        logits = gated(linear_router_logits(router_inputs, learned["router"]), config)
        if not all(learns):  # a layer whose logits are fixed has a loss, but nothing learns from it
            layers = zip(learns, logits.unbind(-3), fixed.unbind(-3), strict=True)
            logits = torch.stack([own if is_own else given for is_own, own, given in layers], dim=-3)
        loss = router_loss(logits, *rest)
        return loss.total, loss

    annealed = _annealed(hyper, step, trace.router_logits.dtype)
    targets = (
        result.targets,
        shares(sums.routed, trace.router_logits.dtype),
        result.real,
        annealed,
        sums.informative,
        sums.real,
    )
    if not any(learns):
        return tree_map(torch.zeros_like, _learned(router, config)), router_loss(trace.router_logits.detach(), *targets)
    inputs = trace.router_inputs.detach(), trace.router_logits.detach(), *targets
    (grads,), loss = gradients(objective, (_learned(router, config),), inputs)
    if result.router_grads is not None:
        main, count = _learned(result.router_grads, config), sums.targets.clamp_min(1)
        grads = {name: grad + main[name] / as_wide_as(grad, count) for name, grad in grads.items()}
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
    router: Tree,
    router_grads: Tree,
    loss: RouterLoss,
    sums: Sums,
    grad_norm: Tensor,
    hyper: HyperParams,
    config: ModelConfig,
) -> tuple[TrainState, Metrics]:
    """The router's step, and with it the new state and the metrics; `fast` are the new parameters of the experts."""
    rate, learning = schedule(state.step, hyper), _while_learning(state.step, hyper)
    router_grad_norm = global_norm(router_grads, state.step.ndim)
    learned, router_opt = adamw_update(
        _learned(router, config), router_grads, state.router_opt, lr=hyper.router_lr * rate * learning,
        weight_decay=0.0, hyper=hyper, grad_scale=clip_factor(router_grad_norm, hyper.max_grad_norm),
    )  # fmt: skip
    moe = moved_leaves(router["layers"]["moe"], learned, sums, state.step, hyper, config, learning)
    params = merge(fast, {"layers": {"moe": moe}})
    new = state._replace(params=params, router_opt=router_opt, step=state.step + 1)
    if not is_off(hyper.regenerate_below):
        replaced = regenerate(
            params, new.expert_opt, router_opt, new.step, load=shares(sums.routed, sums.loss.dtype), hyper=hyper,
            router_learns=hyper.router_lr * learning,
        )  # fmt: skip
        new = new._replace(**replaced)
    lr = (hyper.lr * rate).to(router_grad_norm.dtype)
    return new, step_metrics(sums, loss, hyper, grad_norm=grad_norm, router_grad_norm=router_grad_norm, lr=lr)


def _while_learning(step: Tensor, hyper: HyperParams) -> Number:
    """1 while the router learns, 0 from its `freeze_step` on."""
    if is_off(hyper.freeze_step):
        return 1.0
    last = as_scalar(hyper.freeze_step, step.device)
    return ((step < last) | (last <= 0)).to(number_dtype(step.device))


def _annealed(hyper: HyperParams, step: Tensor, dtype: torch.dtype) -> HyperParams:
    """HyperParams with this step's weight of surprise, as a tensor of that dtype where it changes."""
    if is_off(hyper.surprise_until):
        return hyper
    at = step.to(number_dtype(step.device))  # as Python's own numbers
    until = as_scalar(hyper.surprise_until, at.device, at.dtype)
    share = torch.where(until > 0, (1 - at / until.clamp_min(1)).clamp_min(0), 1.0)
    return hyper._replace(surprise_weight=(hyper.surprise_weight * share).to(dtype))


def _learned(router: Tree, config: ModelConfig) -> dict[str, Any]:
    """The router's leaves that follow a gradient; the selection bias follows the load, unless it is a threshold."""
    names = ("router", "router_bias") if config.routing == "thresholds" else ("router",)
    return {name: router["layers"]["moe"][name] for name in names}
