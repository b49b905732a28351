"""What the two systems minimise, and predictive integrity."""

from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from training.batch import IGNORE_INDEX
from training.cross_entropy import cross_entropy
from training.hyper import HyperParams, Number, is_off


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
    losses, entropies, best, _ = cross_entropy(logits, labels)
    return LanguageModelling(
        losses.sum(), (labels != IGNORE_INDEX).sum(), (best == labels).sum(), entropies.detach().sum()
    )


def distillation(
    logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    temperature: Number,
) -> Float[Tensor, ""]:
    """KL(teacher || student) at a temperature, summed over the tokens that have a target, nats (arXiv 1503.02531)."""
    log_p, log_q = ((x / temperature).log_softmax(dim=-1) for x in (teacher_logits.to(logits.dtype), logits))
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # a token that the teacher rules out (-inf) adds 0
    kl = reduce(log_p.exp() * (finite - log_q), "batch seq vocab -> batch seq", "sum")
    return torch.where(labels != IGNORE_INDEX, kl, 0.0).sum()


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
    shares: Float[Tensor, "layers tokens experts"] | None = None  # soft targets; None puts all on `expert`


def router_targets(
    per_token_surprise: Float[Tensor, "layers tokens experts"],
    real: Bool[Tensor, " tokens"],
    min_candidates: Number,
    sign: Number = 1.0,
    temperature: Number = 0.0,
) -> Targets:
    """target = argmin of sign * surprise over the routed experts; with a temperature, shares of all of them.

    shares = softmax(-sign * surprise / (temperature * the token's mean |surprise|)): no unit, so no layer is special.

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
    expert, informative = signed.argmin(dim=-1), eligible & ~tied
    if is_off(temperature):
        return Targets(expert, informative, tied, None)
    size = torch.where(finite, per_token_surprise.abs(), 0.0).sum(dim=-1) / candidates.clamp_min(1)
    width = (temperature * torch.where(informative, size, 1.0)).clamp_min(torch.finfo(size.dtype).tiny)
    below = torch.where(finite & informative.unsqueeze(-1), lowest.unsqueeze(-1) - signed, -torch.inf)
    hard = torch.zeros_like(signed).scatter(-1, expert.unsqueeze(-1), 1.0)
    soft = torch.where(informative.unsqueeze(-1), below / width.unsqueeze(-1), 0.0).softmax(dim=-1)
    return Targets(expert, informative, tied, torch.where(torch.as_tensor(temperature) > 0, soft, hard))


def shuffled(targets: Targets, words: Int[Tensor, "layers tokens"], switch: Number) -> Targets:
    """With a switch of 1, the targets of each layer's informative tokens dealt out anew among those tokens.

    Args:
        words: random numbers, less than 2**32; their order is the order of dealing.
    """
    behind = 1 << 33  # tokens that do not teach keep their places at the end
    places = torch.arange(words.shape[-1], device=words.device).expand_as(words)
    from_place = torch.where(targets.informative, places, places + behind).argsort(dim=-1)
    to_place = torch.where(targets.informative, words, places + behind).argsort(dim=-1)
    dealt = torch.zeros_like(targets.expert).scatter(-1, to_place, targets.expert.gather(-1, from_place))
    on = torch.as_tensor(switch, device=words.device) > 0
    shares = targets.shares
    if shares is not None:
        wide = from_place.unsqueeze(-1).expand_as(shares), to_place.unsqueeze(-1).expand_as(shares)
        shares = torch.where(on, torch.zeros_like(shares).scatter(1, wide[1], shares.gather(1, wide[0])), shares)
    return targets._replace(expert=torch.where(on, dealt, targets.expert), shares=shares)


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
    *,
    informative: Int[Tensor, ""] | None = None,
    tokens: Int[Tensor, ""] | None = None,
) -> RouterLoss:
    """surprise_weight * CE(logits, target) + balance_weight * balance + z_weight * z.

    balance = E * sum_e load_e * mean_t p_te, per layer, padding excluded (Switch Transformer, arXiv 2101.03961);
    z = mean logsumexp(logits)^2 over real tokens (ST-MoE, arXiv 2202.08906).

    Of a part of a batch, given the load and the numbers of the whole one, these are shares: those of all parts add up,
    and so do their gradients.

    Args:
        informative: (layer, token) pairs that teach; by default those of `targets`.
        tokens: real ones; by default those of `real`.
    """
    informative = targets.informative.sum() if informative is None else informative
    tokens = (real.sum() if tokens is None else tokens).clamp_min(1)
    layers, _, experts = router_logits.shape
    log_p = router_logits.log_softmax(dim=-1)
    if targets.shares is None:
        picked = -log_p.gather(-1, targets.expert.unsqueeze(-1)).squeeze(-1)
    else:
        picked = -(targets.shares * log_p).sum(dim=-1)
    surprise = _masked_sum(picked, targets.informative) / informative.clamp_min(1)
    mean_p = _masked_sum(log_p.exp(), real.unsqueeze(-1), dim=1) / tokens
    balance = experts * (load * mean_p).sum() / layers
    z = _masked_sum(router_logits.logsumexp(dim=-1).square(), real) / (tokens * layers)
    total = hyper.surprise_weight * surprise + hyper.balance_weight * balance + hyper.z_weight * z
    return RouterLoss(total, surprise, balance, z)


def _masked_sum(x: Tensor, keep: Tensor, dim: int | None = None) -> Tensor:
    kept = torch.where(keep, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)
