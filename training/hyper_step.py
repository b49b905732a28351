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
from tiny_onn_func.tree import Tree, leaves, merge, partition
from training import metrics as measure
from training.batch import Batch
from training.differentiate import gradients
from training.explore import draw_exploration
from training.hooks import SurpriseHookManager
from training.hyper import HyperParams, Number
from training.objectives import (
    LanguageModelling,
    RouterLoss,
    Targets,
    language_modelling,
    predictive_integrity,
    router_loss,
    router_targets,
)
from training.optim import AdamWState, adamw_init, adamw_update, clip_factor, global_norm, schedule


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Tree
    expert_opt: AdamWState  # over everything but the router
    router_opt: AdamWState  # over the router's matrix
    step: Tensor  # () int64


def init_state(config: ModelConfig, generator: Generator) -> TrainState:
    """Fresh parameters and optimizers; the same generator state gives the same bits."""
    params = init_params(config, generator)
    fast, router = partition(params)
    step = torch.zeros((), dtype=torch.int64, device=generator.device)
    return TrainState(params, adamw_init(fast), adamw_init(_learned(router)), step)


class Metrics(NamedTuple):
    """What a step measured before its update; 0-d unless a shape is given."""

    main_loss: Tensor  # mean nats per target
    router_loss: Tensor  # mean nats per informative (layer, token)
    main_acc: Tensor  # share of targets that the most probable token hits
    gating_acc: Tensor  # share of informative tokens whose preferred expert is the target
    gating_trivial: Tensor  # what picking a routed expert at random would score
    surprise: Tensor  # mean over routed (layer, token, expert)
    tau: Tensor  # mean entropy of the output distribution, nats
    pi_score: Tensor
    avg_k: Tensor  # experts per real token
    max_vio: Tensor  # (max load - mean load) / mean load, mean over layers
    dead_experts: Tensor  # (layer, expert) pairs without a row in this batch
    tie_rate: Tensor  # share of real (layer, token) whose candidates are all equally surprised
    balance_loss: Tensor
    z_loss: Tensor
    grad_norm: Tensor  # of the mean main loss in the fast parameters, before clipping
    router_grad_norm: Tensor
    lr: Tensor
    expert_load: Tensor  # (L, E) share of routed rows
    target_load: Tensor  # (L, E) share of informative tokens whose target it is
    expert_surprise: Tensor  # (L, E) mean surprise of the expert's rows, 0 where it got none


class Observed(NamedTuple):
    """What one pass through the model yields beside the gradient."""

    lm: LanguageModelling
    trace: RouterTrace
    per_token_surprise: Float[Tensor, "layers tokens experts"]


def hyper_step(state: TrainState, batch: Batch, hyper: HyperParams, config: ModelConfig) -> tuple[TrainState, Metrics]:
    """One step of both systems; pure: the inputs stay untouched and nothing is left behind.

    The experts and all else learn the mean main loss; the router learns which of the experts that a token visited was
    least surprised. Runs under `vmap(lambda s, h: hyper_step(s, batch, h, config))` over stacked states and hypers.
    """
    fast, router = partition(state.params)
    grads, seen = main_gradients(state.params, batch, hyper, config, state.step)
    targets_count = seen.lm.targets.clamp_min(1)
    rate = schedule(state.step, hyper)

    grad_norm = global_norm(grads[0]) / targets_count
    scale = clip_factor(grad_norm, hyper.max_grad_norm) / targets_count
    fast, expert_opt = adamw_update(
        fast, grads[0], state.expert_opt, lr=hyper.lr * rate, weight_decay=hyper.weight_decay, hyper=hyper,
        grad_scale=scale,
    )  # fmt: skip
    real = rearrange(batch.attention_mask != 0, "b s -> (b s)")
    load = measure.expert_load(seen.trace.expert_ids, seen.trace.active, config.num_experts)
    targets = router_targets(seen.per_token_surprise, real, hyper.min_candidates, hyper.surprise_sign)
    learned = _learned(router)
    router_grads, loss = _router_gradients(learned, seen.trace, targets, load, real, hyper)
    if grads[1] is not None:
        main = _learned(grads[1])["router"] / targets_count
        router_grads = {"router": router_grads["router"] + main}
    router_grad_norm = global_norm(router_grads)
    learned, router_opt = adamw_update(
        learned, router_grads, state.router_opt, lr=hyper.router_lr * rate, weight_decay=0.0, hyper=hyper,
        grad_scale=clip_factor(router_grad_norm, hyper.max_grad_norm),
    )  # fmt: skip
    bias = balanced_bias(router["layers"]["moe"]["router_bias"], load, hyper.bias_speed)
    params = merge(fast, {"layers": {"moe": {**learned, "router_bias": bias}}})
    measured = _metrics(seen, targets, loss, load, real, hyper)._replace(
        grad_norm=grad_norm, router_grad_norm=router_grad_norm, lr=(hyper.lr * rate).to(grad_norm.dtype)
    )
    return TrainState(params, expert_opt, router_opt, state.step + 1), measured


def main_gradients(
    params: Tree, batch: Batch, hyper: HyperParams, config: ModelConfig, step: Tensor
) -> tuple[tuple[Tree, Tree | None], Observed]:
    """Gradients of the summed main loss in (fast, router), and what the pass observed.

    The router's is None unless `hyper.router_coupling` lets the main loss in.
    """
    fast, router = partition(params)
    layers, tokens, experts = config.num_hidden_layers, batch.input_ids.numel(), config.num_experts
    explore = None
    if not _off(hyper.explore_prob):
        explore = draw_exploration(hyper.explore_seed, step, hyper.explore_prob, layers, tokens, experts)

    def objective(fast: Tree, router: Tree) -> tuple[Tensor, Observed]:
        dtype = wide_dtype(fast["embed_tokens"].dtype)
        surprise = torch.full((layers, tokens, experts), torch.inf, dtype=dtype, device=batch.input_ids.device)
        hooks = SurpriseHookManager(surprise + _mapped_zero((fast, router, batch, hyper, step), dtype))
        logits, trace = forward(
            merge(fast, router), batch.input_ids, config, attention_mask=batch.attention_mask,
            surprise_budget=hyper.pi_alpha, apply_w2=hooks.apply_w2, router_coupling=hyper.router_coupling,
            explore=explore,
        )  # fmt: skip
        lm = language_modelling(logits, batch.labels)
        return lm.loss_sum, Observed(lm, trace, hooks.per_token_surprise)

    if _off(hyper.router_coupling):
        (grads,), seen = gradients(lambda fast: objective(fast, router), fast, reads=(router, hyper))
        return (grads, None), seen
    (grads, router_grads), seen = gradients(objective, fast, router, reads=hyper)
    return (grads, router_grads), seen


def per_token_surprise(
    params: Tree, batch: Batch, config: ModelConfig, hyper: HyperParams
) -> Float[Tensor, "layers tokens experts"]:
    """(L, B*S, E) surprise of every routed (layer, token, expert), +inf where a token did not go."""
    _, seen = main_gradients(
        params, batch, hyper._replace(explore_prob=0.0), config, torch.zeros((), dtype=torch.int64)
    )
    return seen.per_token_surprise


def balanced_bias(
    bias: Tensor, load: Float[Tensor, "layers experts"], speed: Number
) -> Float[Tensor, "layers experts"]:
    """bias + speed * sign(mean load - load): over-used experts sink (loss-free balancing, arXiv 2408.15664)."""
    return bias + (speed * (load.mean(dim=-1, keepdim=True) - load).sign()).to(bias.dtype)


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


def _metrics(
    seen: Observed, targets: Targets, loss: RouterLoss, load: Tensor, real: Tensor, hyper: HyperParams
) -> Metrics:
    lm, trace, surprise = seen
    count = lm.targets.clamp_min(1)
    informative = targets.informative.sum().clamp_min(1)
    hits = (trace.router_logits.argmax(dim=-1) == targets.expert) & targets.informative
    chance = torch.where(targets.informative, 1 / trace.active.sum(dim=-1).clamp_min(1), 0.0)
    main_loss, tau, mean_surprise = lm.loss_sum / count, lm.entropy_sum / count, measure.mean_finite(surprise)
    unset = main_loss.new_zeros(())
    return Metrics(
        main_loss=main_loss,
        router_loss=loss.surprise,
        main_acc=lm.correct / count,
        gating_acc=hits.sum() / informative,
        gating_trivial=chance.sum() / informative,
        surprise=mean_surprise,
        tau=tau,
        pi_score=predictive_integrity(main_loss, tau, mean_surprise, hyper.pi_alpha, hyper.pi_gamma),
        avg_k=measure.average_k(trace.active, real),
        max_vio=measure.max_vio(load),
        dead_experts=measure.dead_experts(load),
        tie_rate=targets.tied.sum() / (real.sum() * targets.tied.shape[0]).clamp_min(1),
        balance_loss=loss.balance,
        z_loss=loss.z,
        grad_norm=unset,
        router_grad_norm=unset,
        lr=unset,
        expert_load=load,
        target_load=measure.target_load(targets.expert, targets.informative, load.shape[-1]),
        expert_surprise=measure.expert_surprise(surprise),
    )


def _learned(router: Tree) -> dict[str, Any]:
    """The router's leaves that follow a gradient; the selection bias follows the load."""
    return {"router": router["layers"]["moe"]["router"]}


def _mapped_zero(tree: Any, dtype: torch.dtype) -> Tensor:
    """0, batched wherever vmap maps a leaf: in-place writes need the mapped axes of what is written."""
    zeros = [leaf.detach().new_zeros((), dtype=dtype) for leaf in leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack(zeros).sum()


def _off(coefficient: Number) -> bool:
    """Whether a coefficient is the Python number 0, which switches its term off for good."""
    return isinstance(coefficient, float | int) and coefficient == 0
