"""Metrics of a hyper step, computed from its sums."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.step.hyper_params import HyperParams
from training.step.losses import predictive_integrity
from training.step.router_loss import RouterLoss
from training.step.sums import Sums, as_float, count_visits


def shares(
    counts: Int[Tensor, "*runs layers bins"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*runs layers bins"]:
    """Share of each layer's rows that falls into each bin; zeros where there is none. Of experts: their load."""
    return counts.to(dtype) / counts.sum(dim=-1, keepdim=True).clamp_min(1)


def max_vio(load: Float[Tensor, "*runs layers experts"]) -> Float[Tensor, "*runs"]:
    """Mean over layers of (max load - mean load) / mean load; 0 is even, E - 1 is one expert alone.

    A layer without load counts as 0 (MaxVio: Wang et al. 2024, arXiv 2408.15664).
    """
    load = as_float(load)
    mean, highest = load.mean(dim=-1), load.amax(dim=-1)
    used = mean > 0
    return torch.where(used, (highest - mean) / torch.where(used, mean, 1.0), 0.0).mean(dim=-1)


def dead_experts(load: Float[Tensor, "*runs layers experts"]) -> Float[Tensor, "*runs"]:
    """Number of (layer, expert) pairs that got no row in this batch."""
    return (load == 0).sum(dim=(-2, -1)).to(torch.float32)


def load_entropy(load: Float[Tensor, "layers experts"]) -> Float[Tensor, ""]:
    """Mean over layers of -sum_e p_e log p_e / log E with p = load / sum(load), in [0, 1]; 1 is even.

    A layer without load counts as 0; a lone expert with load is even.
    """
    load = as_float(load)
    total = load.sum(dim=-1)
    p = load / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    experts = load.shape[-1]
    if experts == 1:
        return p.mean()
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)
    return (entropy / p.new_full((), experts).log()).clamp(0.0, 1.0).mean()


def average_k(
    active: Bool[Tensor, "layers tokens slots"], attention_mask: Bool[Tensor, " tokens"] | Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Mean number of experts that a real token visits, over layers and tokens; 0 where no token is real."""
    real = attention_mask != 0
    visits = count_visits(active, real).to(torch.float32)
    return visits / (active.shape[0] * real.sum()).clamp_min(1)


class Metrics(NamedTuple):
    """Measurements of a step before its update; one number of each run unless a shape is given."""

    main_loss: Tensor  # mean nats per target
    distill_loss: Tensor  # mean KL(teacher || student) per target, nats; 0 without a teacher
    router_loss: Tensor  # mean nats per informative (layer, token)
    main_acc: Tensor  # share of targets that the most probable token hits
    gating_acc: Tensor  # share of informative tokens whose preferred expert is the target
    gating_trivial: Tensor  # mean of 1 / (experts that the token visits in the layer) over informative (layer, token)
    surprise: Tensor  # mean over routed (layer, token, expert)
    nonfinite_surprise: Tensor  # routed (layer, token, expert) whose surprise is NaN or infinite
    tau: Tensor  # mean entropy of the output distribution, nats
    pi_score: Tensor
    avg_k: Tensor  # experts per real token
    max_vio: Tensor  # (max load - mean load) / mean load, mean over layers
    dead_experts: Tensor  # (layer, expert) pairs without a row in this batch
    tie_rate: Tensor  # share of real (layer, token) with enough candidates, two or more, which are all equal (2^-17)
    balance_loss: Tensor
    z_loss: Tensor
    grad_norm: Tensor  # of the mean main loss in the fast parameters, before clipping
    router_grad_norm: Tensor
    lr: Tensor
    expert_load: Tensor  # (L, E) share of routed rows
    target_load: Tensor  # (L, E) share of informative tokens whose target it is
    expert_surprise: Tensor  # (L, E) mean surprise of the expert's rows, 0 where it got none


def step_metrics(
    sums: Sums, loss: RouterLoss, hyper: HyperParams, *, grad_norm: Tensor, router_grad_norm: Tensor, lr: Tensor
) -> Metrics:
    """The metrics of a step from its sums, its router's loss, and what the optimizers measured."""
    count, informative, layers = sums.targets.clamp_min(1), sums.informative.clamp_min(1), sums.routed.shape[-2]
    wide = sums.loss.dtype
    main_loss, tau, load = sums.loss / count, sums.entropy / count, shares(sums.routed, wide)
    surprise = sums.surprise / sums.surprised.clamp_min(1)
    return Metrics(
        main_loss=main_loss,
        distill_loss=sums.distill / count,
        router_loss=loss.surprise,
        main_acc=sums.correct.to(wide) / count,
        gating_acc=sums.hits.to(wide) / informative,
        gating_trivial=sums.chance / informative,
        surprise=surprise,
        nonfinite_surprise=sums.nonfinite,
        tau=tau,
        pi_score=predictive_integrity(main_loss, tau, surprise, hyper.pi_alpha, hyper.pi_gamma),
        avg_k=sums.visits.to(wide) / (layers * sums.real).clamp_min(1),
        max_vio=max_vio(load),
        dead_experts=dead_experts(load),
        tie_rate=sums.tied.to(wide) / (sums.real * layers).clamp_min(1),
        balance_loss=loss.balance,
        z_loss=loss.z,
        grad_norm=grad_norm,
        router_grad_norm=router_grad_norm,
        lr=lr,
        expert_load=load,
        target_load=shares(sums.wanted, wide),
        expert_surprise=sums.expert_surprise / sums.expert_surprised.clamp_min(1),
    )
