"""Losses of the router: cross entropy of its targets, load balance, z-loss."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.primitives.fused import Values, fused
from training.step.hyper_params import HyperParams
from training.step.rules import Targets


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
    picked, mass, squares = ROUTER_SUMS(router_logits, targets.expert, targets.informative, real)
    if targets.shares is not None:
        taught = torch.where(targets.informative.unsqueeze(-1), router_logits, 0.0)  # 0 times what is no number is none
        cross = -(targets.shares * taught.log_softmax(dim=-1)).sum(dim=-1)
        picked = torch.where(targets.informative, cross, 0.0).sum(dim=-1)
    surprise = picked.sum(dim=-1) / informative.clamp_min(1)
    balance = experts * (load * mass).sum(dim=(-2, -1)) / (tokens * layers)
    z = squares.sum(dim=-1) / (tokens * layers)
    total = hyper.surprise_weight * surprise + hyper.balance_weight * balance + hyper.z_weight * z
    return RouterLoss(total, surprise, balance, z)


def router_sums_reference(logits: Tensor, target: Tensor, informative: Tensor, real: Tensor) -> Values:
    """-log softmax at the target, the softmax, and the squared log of its sum, added up over each layer's tokens.

    What nothing is asked of sends exact zeros back, whatever it is; a logit of +inf has no softmax, and no log of its
    sum.
    """
    is_real = real.unsqueeze(-2)
    logits = torch.where((is_real | informative).unsqueeze(-1), logits, 0.0)
    log_p, log_sum = logits.log_softmax(dim=-1), logits.logsumexp(dim=-1) + logits.detach().amax(dim=-1) * 0
    cross = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (
        torch.where(informative, cross, 0.0).sum(dim=-1),
        torch.where(is_real.unsqueeze(-1), log_p.exp(), 0.0).sum(dim=-2),
        torch.where(is_real, log_sum.square(), 0.0).sum(dim=-1),
    )


ROUTER_SUMS = fused(
    reference=router_sums_reference, kernel=step_kernels.router_sums,
    kernel_grad=lambda grads, inputs, _: (step_kernels.router_sums_grad(grads, *inputs),),
    dims=(3, 2, 2, 1), out_dims=(1, 2, 1), smooth=3,
)  # fmt: skip
