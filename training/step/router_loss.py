"""Router targets from surprise, and the losses of the router."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.kernels import runtime
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import as_wide_as
from tiny_onn_func.primitives.fused import FusedOp, Values, fused
from tiny_onn_func.primitives.vmap import flatten_runs, outside_vmap
from training.step.hyper_params import HyperParams, Number, is_off


class Targets(NamedTuple):
    """What surprise asks of the router."""

    expert: Int[Tensor, "*runs layers tokens"]
    informative: Bool[Tensor, "*runs layers tokens"]  # whether the token teaches the router
    tied: Bool[Tensor, "*runs layers tokens"]  # real, with candidates enough, but all of them equal
    shares: Float[Tensor, "*runs layers tokens experts"] | None = None  # soft targets; None puts all on `expert`


def router_targets(
    per_token_surprise: Float[Tensor, "*runs layers tokens experts"],
    real: Bool[Tensor, "*#runs tokens"],
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
    runs, numbers = per_token_surprise.shape[:-3], (min_candidates, sign)  # a kernel reads one of each run
    least, side = (torch.as_tensor(n, device=real.device, dtype=torch.float32).expand(runs) for n in numbers)
    real = real.expand(*runs, -1)
    expert, informative, tied = outside_vmap(_argmin_targets, per_token_surprise, real, least, side)
    if is_off(temperature):
        return Targets(expert, informative, tied, None)
    finite = per_token_surprise.isfinite()
    signed = torch.where(finite, per_token_surprise * as_wide_as(finite, sign), torch.inf)
    size = torch.where(finite, per_token_surprise.abs(), 0.0).sum(dim=-1) / finite.sum(dim=-1).clamp_min(1)
    temperature = temperature.to(size.dtype) if isinstance(temperature, Tensor) else temperature
    width = as_wide_as(size, temperature) * torch.where(informative, size, 1.0)
    width = width.clamp_min(torch.finfo(size.dtype).tiny)
    below = torch.where(finite & informative.unsqueeze(-1), signed.amin(dim=-1, keepdim=True) - signed, -torch.inf)
    hard = torch.zeros_like(signed).scatter(-1, expert.unsqueeze(-1), 1.0)
    soft = torch.where(informative.unsqueeze(-1), below / width.unsqueeze(-1), 0.0).softmax(dim=-1)
    is_soft = as_wide_as(soft, torch.as_tensor(temperature)) > 0
    return Targets(expert, informative, tied, torch.where(is_soft, soft, hard))


def _argmin_targets(surprise: Tensor, real: Tensor, least: Tensor, sign: Tensor) -> Values:
    """(expert, informative, tied), of one run or of several with axes of them in front."""
    if runtime.usable_now(surprise):
        one_run = flatten_runs(surprise, 3), flatten_runs(real, 1), flatten_runs(least, 0), flatten_runs(sign, 0)
        return tuple(t.view(surprise.shape[:-1]) for t in step_kernels.least_surprised(*one_run))
    finite = surprise.isfinite()
    signed = torch.where(finite, surprise * sign[..., None, None, None], torch.inf)
    lowest = signed.amin(dim=-1)
    highest = torch.where(finite, signed, -torch.inf).amax(dim=-1)
    candidates = finite.sum(dim=-1)
    eligible = real.unsqueeze(-2) & (candidates >= least[..., None, None]) & (candidates >= 1)
    tied = eligible & (candidates > 1) & (lowest == highest)
    return signed.argmin(dim=-1), eligible & ~tied, tied


def shuffled(targets: Targets, words: Int[Tensor, "*runs layers tokens"], switch: Number) -> Targets:
    """With a switch of 1, the targets of each layer's informative tokens dealt out anew among those tokens.

    Args:
        words: random numbers, less than 2**32; their order is the order of dealing.
    """
    behind = 1 << 33  # tokens that do not teach keep their places at the end
    places = torch.arange(words.shape[-1], device=words.device).expand_as(words)
    from_place = torch.where(targets.informative, places, places + behind).argsort(dim=-1)
    to_place = torch.where(targets.informative, words, places + behind).argsort(dim=-1)
    dealt = torch.zeros_like(targets.expert).scatter(-1, to_place, targets.expert.gather(-1, from_place))
    on = as_wide_as(words, torch.as_tensor(switch, device=words.device) > 0)
    shares = targets.shares
    if shares is not None:
        wide = from_place.unsqueeze(-1).expand_as(shares), to_place.unsqueeze(-1).expand_as(shares)
        dealt_shares = torch.zeros_like(shares).scatter(-2, wide[1], shares.gather(-2, wide[0]))
        shares = torch.where(on.unsqueeze(-1), dealt_shares, shares)
    return targets._replace(expert=torch.where(on, dealt, targets.expert), shares=shares)


class RouterLoss(NamedTuple):
    """Terms of the router's loss, each a mean over layers and tokens, and their weighted sum."""

    total: Tensor
    surprise: Tensor  # cross entropy of the targets, nats
    balance: Tensor
    z: Tensor


def router_loss(
    router_logits: Float[Tensor, "*runs layers tokens experts"],
    targets: Targets,
    load: Float[Tensor, "*runs layers experts"],
    real: Bool[Tensor, "*runs tokens"],
    hyper: HyperParams,
    *,
    informative: Int[Tensor, "*runs"] | None = None,
    tokens: Int[Tensor, "*runs"] | None = None,
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
    informative = targets.informative.sum(dim=(-2, -1)) if informative is None else informative
    tokens = (real.sum(dim=-1) if tokens is None else tokens).clamp_min(1)
    layers, _, experts = router_logits.shape[-3:]
    real = real.expand(*router_logits.shape[:-3], -1)
    picked, mass, squares = _router_sums(router_logits, targets.expert, targets.informative, real)
    if targets.shares is not None:
        cross = -(targets.shares * router_logits.log_softmax(dim=-1)).sum(dim=-1)
        picked = torch.where(targets.informative, cross, 0.0).sum(dim=-1)
    surprise = picked.sum(dim=-1) / informative.clamp_min(1)
    balance = experts * (load * mass).sum(dim=(-2, -1)) / (tokens * layers)
    z = squares.sum(dim=-1) / (tokens * layers)
    total = hyper.surprise_weight * surprise + hyper.balance_weight * balance + hyper.z_weight * z
    return RouterLoss(total, surprise, balance, z)


def router_sums_reference(logits: Tensor, target: Tensor, informative: Tensor, real: Tensor) -> Values:
    """-log softmax at the target, the softmax, and the squared log of its sum, added up over each layer's tokens."""
    log_p, is_real = logits.log_softmax(dim=-1), real.unsqueeze(-2)
    cross = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (
        torch.where(informative, cross, 0.0).sum(dim=-1),
        torch.where(is_real.unsqueeze(-1), log_p.exp(), 0.0).sum(dim=-2),
        torch.where(is_real, logits.logsumexp(dim=-1).square(), 0.0).sum(dim=-1),
    )


def _one_run(logits: Tensor, target: Tensor, informative: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    return flatten_runs(logits, 3), flatten_runs(target, 2), flatten_runs(informative, 2), flatten_runs(real, 1)


def _sums_kernel(*inputs: Tensor) -> Values:
    made = step_kernels.router_sums(*_one_run(*inputs))
    return tuple(t.view(*inputs[0].shape[:-3], *t.shape[1:]) for t in made)


def _sums_kernel_grad(grads: Values, inputs: Values, outputs: Values) -> Values:
    picked, mass, squares = flatten_runs(grads[0], 1), flatten_runs(grads[1], 2), flatten_runs(grads[2], 1)
    return (step_kernels.router_sums_grad((picked, mass, squares), *_one_run(*inputs)).view(inputs[0].shape),)


ROUTER_SUMS = FusedOp(router_sums_reference, _sums_kernel, _sums_kernel_grad, differentiable=1, smooth=3)
_router_sums = fused(ROUTER_SUMS)
