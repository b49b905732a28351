"""The hyper step: (state, batch) -> (state, metrics), two systems at two speeds from one forward and one backward."""

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Generator, Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.params import init_params
from tiny_onn_func.tree import Tree, leaves, merge, partition, tree_map
from training import metrics as measure
from training.batch import Batch
from training.differentiate import gradients
from training.draws import Stream, draw_exploration, draw_words
from training.hooks import SurpriseHookManager
from training.hyper import HyperParams, Number, is_off
from training.objectives import (
    RouterLoss,
    Targets,
    distillation,
    language_modelling,
    router_loss,
    router_targets,
    shuffled,
)
from training.optim import AdamWState, adamw_init, adamw_update, clip_factor, global_norm, schedule
from training.oracle import sampled_losses
from training.regenerate import regenerate
from training.step_metrics import Metrics, Observed, step_metrics
from training.surprise import PER_WEIGHT, SurpriseKind, beside_own_mean, per_weight


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Tree
    expert_opt: AdamWState  # over everything but the router
    router_opt: AdamWState  # over the router's matrix, and its thresholds where they are learned
    step: Tensor  # () int64


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
    teacher_logits: Float[Tensor, "batch seq vocab"] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of both systems; pure: the inputs stay untouched and nothing is left behind.

    The experts and all else learn the mean main loss; the router learns which of the experts that a token visited was
    least surprised. Runs under `vmap(lambda s, h: hyper_step(s, batch, h, config))` over stacked states and hypers.

    Args:
        kind: what surprise is, see `training.surprise`; static, as it decides which hooks there are.
        compute_dtype: what everything but the router computes in, such as bfloat16; None is the parameters' own dtype.
            Parameters, moments, router, surprise and losses stay as wide as they are.
        teacher_logits: with `hyper.distill_alpha` the main loss, and so surprise, is the mixture of cross entropy and
            distillation; the metric `main_loss` stays the cross entropy.
    """
    fast, router = partition(state.params)
    grads, seen = main_gradients(state.params, batch, hyper, config, state.step, kind, compute_dtype, teacher_logits)
    targets_count = seen.lm.targets.clamp_min(1)
    rate = schedule(state.step, hyper)

    grad_norm = global_norm(grads[0]) / targets_count
    scale = clip_factor(grad_norm, hyper.max_grad_norm) / targets_count
    fast, expert_opt = adamw_update(
        fast, grads[0], state.expert_opt, lr=hyper.lr * rate, weight_decay=hyper.weight_decay, hyper=hyper,
        grad_scale=scale, backbone_scale=hyper.backbone_lr_scale,
    )  # fmt: skip
    real = rearrange(batch.attention_mask != 0, "b s -> (b s)")
    load = measure.expert_load(seen.trace.expert_ids, seen.trace.active, config.num_experts)
    targets = _targets(seen.per_token_surprise, real, hyper, state.step)
    learned, learning = _learned(router, config), _while_learning(state.step, hyper)
    router_grads, loss = _router_gradients(learned, seen.trace, targets, load, real, _annealed(hyper, state.step))
    if grads[1] is not None:
        main = _learned(grads[1], config)
        router_grads = {name: grad + main[name] / targets_count for name, grad in router_grads.items()}
    router_grad_norm = global_norm(router_grads)
    learned, router_opt = adamw_update(
        learned, router_grads, state.router_opt, lr=hyper.router_lr * rate * learning, weight_decay=0.0, hyper=hyper,
        grad_scale=clip_factor(router_grad_norm, hyper.max_grad_norm),
    )  # fmt: skip
    slow = {**router["layers"]["moe"], **learned}
    slow["router_bias"] = balanced_bias(slow["router_bias"], load, hyper.bias_speed * learning)
    params = tree_map(lambda _, leaf: leaf, state.params, merge(fast, {"layers": {"moe": slow}}))  # in the order it had
    new = TrainState(params, expert_opt, router_opt, state.step + 1)
    if not is_off(hyper.regenerate_below):
        new = new._replace(**regenerate(*new, load=load, hyper=hyper))
    measured = step_metrics(seen, targets, loss, load, real, hyper)._replace(
        grad_norm=grad_norm, router_grad_norm=router_grad_norm, lr=(hyper.lr * rate).to(grad_norm.dtype)
    )
    return new, measured


def main_gradients(
    params: Tree,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    step: Tensor,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "batch seq vocab"] | None = None,
) -> tuple[tuple[Tree, Tree | None], Observed]:
    """Gradients of the summed main loss in (fast, router), and what the pass observed.

    The router's is None unless `hyper.router_coupling` lets the main loss in.
    """
    fast, router = partition(params)
    layers, tokens, experts = config.num_hidden_layers, batch.input_ids.numel(), config.num_experts
    explore = None
    if not is_off(hyper.explore_prob):
        explore = draw_exploration(hyper.explore_seed, step, hyper.explore_prob, layers, tokens, experts)

    def objective(fast: Tree, router: Tree) -> tuple[Tensor, Observed]:
        dtype = wide_dtype(fast["embed_tokens"].dtype)
        surprise = torch.full((layers, tokens, experts), torch.inf, dtype=dtype, device=batch.input_ids.device)
        hooks = SurpriseHookManager(surprise + _mapped_zero((fast, router, batch, hyper, step), dtype), kind=kind)
        computed = fast if compute_dtype is None else tree_map(lambda leaf: leaf.to(compute_dtype), fast)
        logits, trace = forward(
            merge(computed, router), batch.input_ids, config, attention_mask=batch.attention_mask,
            surprise_budget=hyper.pi_alpha, apply_w2=hooks.apply_w2, apply_w13=hooks.apply_w13,
            router_coupling=hyper.router_coupling, explore=explore,
        )  # fmt: skip
        lm = language_modelling(logits, batch.labels)
        total, kl = lm.loss_sum, lm.loss_sum.new_zeros(())
        if teacher_logits is not None and not is_off(hyper.distill_alpha):
            kl = distillation(logits, teacher_logits, batch.labels, hyper.distill_temperature)
            alpha = hyper.distill_alpha
            total = (1 - alpha) * total + alpha * hyper.distill_temperature**2 * kl
        none_yet = torch.zeros_like(lm.targets)  # surprise is there after the backward pass
        return total.to(lm.loss_sum.dtype), Observed(lm, trace, hooks.per_token_surprise, kl, none_yet)

    trees = (fast,) if is_off(hyper.router_coupling) else (fast, router)
    grads, seen = gradients(lambda *own: objective(*own, *(fast, router)[len(own) :]), *trees, reads=(router, hyper))
    trace = seen.trace
    nonfinite = measure.nonfinite_surprise(seen.per_token_surprise, trace.expert_ids, trace.active)
    seen = seen._replace(nonfinite=nonfinite)
    if kind == "oracle":
        values = sampled_losses(params, batch, config, hyper.explore_seed, step, hyper.pi_alpha)
        seen = seen._replace(per_token_surprise=values.to(seen.per_token_surprise.dtype))
    if kind in PER_WEIGHT:
        surprise = per_weight(seen.per_token_surprise, trace.expert_ids, trace.weights, trace.active)
        seen = seen._replace(per_token_surprise=surprise)
    return (grads[0], grads[1] if len(grads) > 1 else None), seen


def per_token_surprise(
    params: Tree, batch: Batch, config: ModelConfig, hyper: HyperParams, *, kind: SurpriseKind = "w2"
) -> Float[Tensor, "layers tokens experts"]:
    """(L, B*S, E) surprise of every routed (layer, token, expert), +inf where a token did not go."""
    start = torch.zeros((), dtype=torch.int64)
    _, seen = main_gradients(params, batch, hyper._replace(explore_prob=0.0), config, start, kind)
    return seen.per_token_surprise


def balanced_bias(
    bias: Tensor, load: Float[Tensor, "layers experts"], speed: Number
) -> Float[Tensor, "layers experts"]:
    """bias + speed * sign(mean load - load): over-used experts sink (loss-free balancing, arXiv 2408.15664)."""
    return bias + (speed * (load.mean(dim=-1, keepdim=True) - load).sign()).to(bias.dtype)


def _targets(surprise: Tensor, real: Tensor, hyper: HyperParams, step: Tensor) -> Targets:
    """What surprise asks of the router in this step."""
    if not is_off(hyper.expert_norm):
        surprise = beside_own_mean(surprise, hyper.expert_norm)
    targets = router_targets(
        surprise, real, hyper.min_candidates, hyper.surprise_sign, hyper.target_temperature
    )  # fmt: skip
    if is_off(hyper.shuffle_targets):
        return targets
    words = draw_words(hyper.explore_seed, step, Stream.SHUFFLE, *targets.expert.shape)
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


def _router_gradients(
    learned: Tree, trace: RouterTrace, targets: Targets, load: Tensor, real: Tensor, hyper: HyperParams
) -> tuple[Tree, RouterLoss]:
    """The router is linear in detached inputs: its gradient needs no second pass through the model."""
    inputs = trace.router_inputs.detach()

    def objective(learned: Tree) -> tuple[Tensor, RouterLoss]:
        router = learned["router"]
        dtype = wide_dtype(router.dtype)
        logits = einsum(inputs.to(dtype), router.to(dtype), "l tokens dim, l dim experts -> l tokens experts")
        loss = router_loss(logits, targets, load, real, hyper)
        return loss.total, loss

    (grads,), loss = gradients(objective, learned, reads=hyper)
    return grads, loss


def _learned(router: Tree, config: ModelConfig) -> dict[str, Any]:
    """The router's leaves that follow a gradient; the selection bias follows the load, unless it is a threshold."""
    names = ("router", "router_bias") if config.routing == "thresholds" else ("router",)
    return {name: router["layers"]["moe"][name] for name in names}


def _mapped_zero(tree: Any, dtype: torch.dtype) -> Tensor:
    """0, batched wherever vmap maps a leaf: in-place writes need the mapped axes of what is written."""
    zeros = [leaf.detach().new_zeros((), dtype=dtype) for leaf in leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack(zeros).sum()
