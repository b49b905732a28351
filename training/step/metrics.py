"""Metrics of a hyper step, computed from its sums."""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.fields import show_in_help
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
    """Measurements of a hyper step before its update: a number per run, or (L, E) numbers where the unit says so."""

    main_loss: Annotated[Tensor, "nats per target"]
    """Cross entropy of the next token, mean over the target tokens of the batch."""
    distill_loss: Annotated[Tensor, "nats per target"]
    """KL(teacher || student), mean over the target tokens; 0 without a teacher."""
    router_loss: Annotated[Tensor, "nats per (layer, token)"]
    """Cross entropy of the router's logits to its targets, mean over the informative (layer, token) pairs."""
    main_acc: Annotated[Tensor, "share"]
    """Share of target tokens that equal the model's most probable token."""
    gating_acc: Annotated[Tensor, "share"]
    """Gating accuracy: share of informative (layer, token) pairs whose largest router logit is at the target expert. A
    high value is not success in itself; see *K = 1 is a trap* in the README."""
    gating_trivial: Annotated[Tensor, "share"]
    """Chance level of `gating_acc`: mean of 1 / (experts that the token visits in the layer) over the informative
    (layer, token) pairs. It assumes that the target is among the visited experts, which it need not be with shuffled or
    oracle targets."""
    surprise: Annotated[Tensor, "nats per unit of weight"]
    """Mean surprise over the visits. The unit is that of the kind w2, a gradient norm; `benefit` and `oracle` are in
    nats."""
    nonfinite_surprise: Annotated[Tensor, "visits"]
    """Visits whose surprise is NaN or infinite."""
    tau: Annotated[Tensor, "nats"]
    """Mean entropy of the model's output distribution over the target tokens."""
    pi_score: Annotated[Tensor, "0 to 1"]
    """Predictive integrity: exp(-pi_alpha * (main_loss / tau + pi_gamma * surprise))."""
    avg_k: Annotated[Tensor, "experts per token"]
    """Experts that a real token visits, mean over layers and tokens."""
    max_vio: Annotated[Tensor, "ratio"]
    """Maximal violation of balance: (largest load - mean load) / mean load, mean over layers; 0 is an even load, E - 1
    is a single expert with all tokens (arXiv 2408.15664)."""
    dead_experts: Annotated[Tensor, "(layer, expert) pairs"]
    """Pairs without a visit in this batch."""
    tie_rate: Annotated[Tensor, "share"]
    """Share of real (layer, token) pairs whose candidates, two or more, have equal surprise (largest and smallest
    differ by at most 2^-17 of the larger): such a pair does not teach the router."""
    balance_loss: Annotated[Tensor, "number"]
    """Load-balance loss of the Switch Transformer, before its weight; 1 where the load or the router's mean
    probabilities are even."""
    z_loss: Annotated[Tensor, "number"]
    """Router z-loss of ST-MoE, before its weight."""
    grad_norm: Annotated[Tensor, "nats per unit of weight"]
    """Norm of the gradient of the mean main loss in the parameters of the fast system, before clipping."""
    router_grad_norm: Annotated[Tensor, "nats per unit of weight"]
    """Norm of the router's gradient, before clipping."""
    lr: Annotated[Tensor, "per step"]
    """Learning rate of the fast system in this step, after warm-up and schedule."""
    expert_load: Annotated[Tensor, "share, (L, E)"]
    """Load: share of a layer's visits that go to an expert."""
    target_load: Annotated[Tensor, "share, (L, E)"]
    """Share of a layer's informative tokens whose target is this expert."""
    expert_surprise: Annotated[Tensor, "nats per unit of weight, (L, E)"]
    """Mean surprise of an expert's visits; 0 without a visit."""


show_in_help(Metrics)


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
