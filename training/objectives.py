"""What the two systems minimise, and predictive integrity."""

from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.batch import IGNORE_INDEX
from training.hyper import HyperParams, Number


class LanguageModelling(NamedTuple):
    """Sums over the tokens that have a target, all 0-d."""

    loss_sum: Tensor  # nats
    targets: Tensor  # number of target tokens
    correct: Tensor  # targets that the most probable token hits
    entropy_sum: Tensor  # of the output distribution, nats; detached


def language_modelling(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> LanguageModelling:
    """Cross entropy of the labels, summed; labels of -100 count nowhere.

    The *sum* is what surprise differentiates: a batch that is split or padded keeps every token's value.
    """
    is_target = labels != IGNORE_INDEX
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    seen = log_p.detach()
    entropy = -reduce(seen.exp() * seen, "batch seq vocab -> batch seq", "sum")
    correct = (seen.argmax(dim=-1) == labels) & is_target
    return LanguageModelling(
        -torch.where(is_target, picked, 0.0).sum(),
        is_target.sum(),
        correct.sum(),
        torch.where(is_target, entropy, 0.0).sum(),
    )


def predictive_integrity(
    main_loss: Tensor, tau: Tensor, surprise: Tensor, pi_alpha: Number, pi_gamma: Number
) -> Float[Tensor, ""]:
    """pi_score = exp(-pi_alpha * (main_loss / tau + pi_gamma * surprise)); losses and tau in nats."""
    return torch.exp(-pi_alpha * (main_loss / tau.clamp_min(torch.finfo(tau.dtype).tiny) + pi_gamma * surprise))


class Targets(NamedTuple):
    """What surprise asks of the router."""

    expert: Int[Tensor, "layers tokens"]
    informative: Bool[Tensor, "layers tokens"]  # whether the token teaches the router
    tied: Bool[Tensor, "layers tokens"]  # real, with candidates enough, but all of them equal


def router_targets(
    per_token_surprise: Float[Tensor, "layers tokens experts"],
    real: Bool[Tensor, " tokens"],
    min_candidates: Number,
    sign: Number = 1.0,
) -> Targets:
    """target = argmin of sign * surprise over the routed experts.

    A token teaches iff it is real, has at least `min_candidates` routed experts, and they are not all tied: the argmin
    of a token without gradient (surprise 0 everywhere) would quietly favour the first expert. A lone candidate, allowed
    by min_candidates = 1, is not a tie.
    """
    finite = per_token_surprise.isfinite()
    signed = torch.where(finite, per_token_surprise * sign, torch.inf)
    lowest = signed.amin(dim=-1)
    highest = torch.where(finite, signed, -torch.inf).amax(dim=-1)
    candidates = finite.sum(dim=-1)
    eligible = real & (candidates >= min_candidates) & (candidates >= 1)
    tied = eligible & (candidates > 1) & (lowest == highest)
    return Targets(signed.argmin(dim=-1), eligible & ~tied, tied)


class RouterLoss(NamedTuple):
    """Terms of the router's loss, each a mean over layers and tokens, and their weighted sum."""

    total: Tensor
    surprise: Tensor  # cross entropy of the targets, nats
    balance: Tensor
    z: Tensor


def router_loss(
    router_logits: Float[Tensor, "layers tokens experts"],
    targets: Targets,
    load: Float[Tensor, "layers experts"],
    real: Bool[Tensor, " tokens"],
    hyper: HyperParams,
) -> RouterLoss:
    """surprise_weight * CE(logits, target) + balance_weight * balance + z_weight * z.

    balance = E * sum_e load_e * mean_t p_te, per layer, padding excluded (Switch Transformer, arXiv 2101.03961);
    z = mean logsumexp(logits)^2 over real tokens (ST-MoE, arXiv 2202.08906).
    """
    layers, _, experts = router_logits.shape
    log_p = router_logits.log_softmax(dim=-1)
    picked = -log_p.gather(-1, targets.expert.unsqueeze(-1)).squeeze(-1)
    surprise = _masked_sum(picked, targets.informative) / targets.informative.sum().clamp_min(1)
    tokens = real.sum().clamp_min(1)
    mean_p = _masked_sum(log_p.exp(), real.unsqueeze(-1), dim=1) / tokens
    balance = experts * (load * mean_p).sum() / layers
    z = _masked_sum(router_logits.logsumexp(dim=-1).square(), real) / (tokens * layers)
    total = hyper.surprise_weight * surprise + hyper.balance_weight * balance + hyper.z_weight * z
    return RouterLoss(total, surprise, balance, z)


def _masked_sum(x: Tensor, keep: Tensor, dim: int | None = None) -> Tensor:
    kept = torch.where(keep, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)
