"""The main loss: its gradient, and what the one forward and one backward pass through the model observe."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.decoder import forward
from tiny_onn_func.moe import RouterTrace
from tiny_onn_func.ops import wide_dtype
from tiny_onn_func.primitives.vmap import each_run
from tiny_onn_func.tree import Tree, leaves, merge, partition, tree_map
from training.step.batch import Batch
from training.step.counter_rng import random_exploration
from training.step.gradients import gradients
from training.step.hooks import SurpriseHookManager
from training.step.hyper_params import HyperParams, is_off
from training.step.losses import LanguageModelling, distillation, language_modelling
from training.step.oracle import sampled_losses
from training.step.surprise import PER_WEIGHT, SurpriseKind, divide_by_weight, nonfinite_surprise


class PassResult(NamedTuple):
    """What one pass through the model yields beside the gradient."""

    lm: LanguageModelling
    trace: RouterTrace
    per_token_surprise: Float[Tensor, "*runs layers tokens experts"]
    distill_sum: Tensor  # KL(teacher || student), nats, summed over targets
    nonfinite: Tensor  # routed (layer, token, expert) whose measured surprise is NaN or infinite


class BatchShard(NamedTuple):
    """Which of the equal shares of a batch's rows these are: the draws of chance are those of the whole batch."""

    place: int = 0
    of: int = 1


WHOLE = BatchShard()
HooksFactory = Callable[..., SurpriseHookManager]  # (surface, kind=kind) -> hooks


def main_gradients(
    params: Tree,
    batch: Batch,
    hyper: HyperParams,
    config: ModelConfig,
    step: Tensor,
    kind: SurpriseKind = "w2",
    compute_dtype: torch.dtype | None = None,
    teacher_logits: Float[Tensor, "*runs batch seq vocab"] | None = None,
    *,
    share: BatchShard = WHOLE,
    hooks_factory: HooksFactory = SurpriseHookManager,
) -> tuple[tuple[Tree, Tree | None], PassResult]:
    """Gradients of the summed main loss in (fast, router), and what the pass observed.

    The router's is None unless `hyper.router_coupling` lets the main loss in.
    """
    fast, router = partition(params)
    layers, tokens, experts = config.num_hidden_layers, batch.input_ids.shape[-2:].numel(), config.num_experts
    explore = None
    if not is_off(hyper.explore_prob):
        drawn = random_exploration(hyper.explore_seed, step, hyper.explore_prob, layers, tokens * share.of, experts)
        explore = drawn[..., tokens * share.place : tokens * (share.place + 1)]

    def objective(fast: Tree, router: Tree, given: Any) -> tuple[Tensor, PassResult]:
        batch, hyper, explore, teacher_logits = given
        dtype = wide_dtype(fast["embed_tokens"].dtype)
        shape = *batch.input_ids.shape[:-2], layers, tokens, experts
        surprise = torch.full(shape, torch.inf, dtype=dtype, device=batch.input_ids.device)
        hooks = hooks_factory(_wrapped_like((fast, router, given), surprise), kind=kind)
        computed = fast if compute_dtype is None else tree_map(lambda leaf: leaf.to(compute_dtype), fast)
        logits, trace = forward(
            merge(computed, router), batch.input_ids, config, attention_mask=batch.attention_mask,
            surprise_budget=hyper.pi_alpha, apply_w2=hooks.apply_w2, apply_w13=hooks.apply_w13,
            router_coupling=hyper.router_coupling, explore=explore,
        )  # fmt: skip
        lm = language_modelling(logits, batch.labels)
        total, kl = lm.loss_sum, torch.zeros_like(lm.loss_sum)
        if teacher_logits is not None and not is_off(hyper.distill_alpha):
            kl = distillation(logits, teacher_logits, batch.labels, hyper.distill_temperature)
            alpha = hyper.distill_alpha
            total = (1 - alpha) * total + alpha * hyper.distill_temperature**2 * kl
        none_yet = torch.zeros_like(lm.targets)  # surprise is there after the backward pass
        return total.to(lm.loss_sum.dtype), PassResult(lm, trace, hooks.per_token_surprise, kl, none_yet)

    given = batch, hyper, explore, teacher_logits
    if is_off(hyper.router_coupling):
        grads, seen = gradients(lambda fast, given: objective(fast, *given), (fast,), (router, given))
    else:
        grads, seen = gradients(objective, (fast, router), given)
    trace = seen.trace
    nonfinite = nonfinite_surprise(seen.per_token_surprise, trace.expert_ids, trace.active)
    seen = seen._replace(nonfinite=nonfinite)
    if kind == "oracle":
        values = each_run(lambda one: sampled_losses(one, config), (params, batch, hyper, step), step.ndim)
        seen = seen._replace(per_token_surprise=values.to(seen.per_token_surprise.dtype))
    if kind in PER_WEIGHT:
        surprise = divide_by_weight(seen.per_token_surprise, trace.expert_ids, trace.weights, trace.active)
        seen = seen._replace(per_token_surprise=surprise)
    return (grads[0], grads[1] if len(grads) > 1 else None), seen


def per_token_surprise(
    params: Tree, batch: Batch, config: ModelConfig, hyper: HyperParams, *, kind: SurpriseKind = "w2"
) -> Float[Tensor, "layers tokens experts"]:
    """(L, B*S, E) surprise of every routed (layer, token, expert), +inf where a token did not go."""
    start = torch.zeros((), dtype=torch.int64)
    _, seen = main_gradients(params, batch, hyper._replace(explore_prob=0.0), config, start, kind)
    return seen.per_token_surprise


def _wrapped_like(tree: Any, t: Tensor) -> Tensor:
    """The tensor, wrapped by every transform that wraps a leaf, as in-place writes need."""
    wrapped = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor) and is_functorch_wrapped_tensor(leaf)]
    zeros = [leaf.detach().new_zeros((), dtype=t.dtype) for leaf in wrapped]
    return t + torch.stack(zeros).sum() if zeros else t
