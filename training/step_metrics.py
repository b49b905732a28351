"""What a hyper step tells about itself."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.moe import RouterTrace
from training import metrics as measure
from training.hyper import HyperParams
from training.objectives import LanguageModelling, RouterLoss, Targets, predictive_integrity


class Metrics(NamedTuple):
    """What a step measured before its update; 0-d unless a shape is given."""

    main_loss: Tensor  # mean nats per target
    distill_loss: Tensor  # mean KL(teacher || student) per target, nats; 0 without a teacher
    router_loss: Tensor  # mean nats per informative (layer, token)
    main_acc: Tensor  # share of targets that the most probable token hits
    gating_acc: Tensor  # share of informative tokens whose preferred expert is the target
    gating_trivial: Tensor  # what picking a routed expert at random would score
    surprise: Tensor  # mean over routed (layer, token, expert)
    nonfinite_surprise: Tensor  # routed (layer, token, expert) whose surprise is NaN or infinite
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
    distill_sum: Tensor  # KL(teacher || student), nats, summed over targets
    nonfinite: Tensor  # routed (layer, token, expert) whose measured surprise is NaN or infinite


def step_metrics(
    seen: Observed, targets: Targets, loss: RouterLoss, load: Tensor, real: Tensor, hyper: HyperParams
) -> Metrics:
    """All but what only the optimizers know: `grad_norm`, `router_grad_norm` and `lr` are zero here."""
    lm, trace, surprise, distill_sum, nonfinite = seen
    count = lm.targets.clamp_min(1)
    informative = targets.informative.sum().clamp_min(1)
    hits = (trace.router_logits.argmax(dim=-1) == targets.expert) & targets.informative
    chance = torch.where(targets.informative, 1 / trace.active.sum(dim=-1).clamp_min(1), 0.0)
    main_loss, tau, mean_surprise = lm.loss_sum / count, lm.entropy_sum / count, measure.mean_finite(surprise)
    unset = main_loss.new_zeros(())
    return Metrics(
        main_loss=main_loss,
        distill_loss=distill_sum / count,
        router_loss=loss.surprise,
        main_acc=lm.correct / count,
        gating_acc=hits.sum() / informative,
        gating_trivial=chance.sum() / informative,
        surprise=mean_surprise,
        nonfinite_surprise=nonfinite,
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
