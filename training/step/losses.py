"""Main losses: cross entropy, distillation, and predictive integrity."""

from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.checks import check_indices
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import as_wide_as
from tiny_onn_func.primitives.fused import Values, fused
from training.step.batch import IGNORE_INDEX
from training.step.hyper_params import Number


class LanguageModelling(NamedTuple):
    """Sums over the tokens that have a target, of each run."""

    loss_sum: Tensor  # nats
    targets: Tensor  # number of target tokens
    correct: Tensor  # targets that the most probable token hits
    entropy_sum: Tensor  # of the output distribution, nats; detached


def language_modelling(
    logits: Float[Tensor, "*runs batch seq vocab"], labels: Int[Tensor, "*runs batch seq"]
) -> LanguageModelling:
    """Cross entropy of the labels, summed; labels of -100 count nowhere.

    The *sum* is what surprise differentiates: a batch that is split or padded keeps every token's value.
    """
    losses, entropies, best, _ = cross_entropy(logits, labels)
    summed = losses, labels != IGNORE_INDEX, best == labels, entropies.detach()
    return LanguageModelling(*(t.sum(dim=(-2, -1)) for t in summed))


def distillation(
    logits: Float[Tensor, "*runs batch seq vocab"],
    teacher_logits: Float[Tensor, "*runs batch seq vocab"],
    labels: Int[Tensor, "*runs batch seq"],
    temperature: Number,
) -> Float[Tensor, "*runs"]:
    """KL(teacher || student) at a temperature, summed over the tokens that have a target, nats (arXiv 1503.02531)."""
    temperature = as_wide_as(logits, temperature)
    log_p, log_q = ((x / temperature).log_softmax(dim=-1) for x in (teacher_logits.to(logits.dtype), logits))
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # a token that the teacher rules out (-inf) adds 0
    kl = reduce(log_p.exp() * (finite - log_q), "... vocab -> ...", "sum")
    return torch.where(labels != IGNORE_INDEX, kl, 0.0).sum(dim=(-2, -1))


def predictive_integrity(
    main_loss: Tensor, tau: Tensor, surprise: Tensor, pi_alpha: Number, pi_gamma: Number
) -> Float[Tensor, "*runs"]:
    """pi_score = exp(-pi_alpha * (main_loss / tau + pi_gamma * surprise)); losses and tau in nats."""
    return torch.exp(-pi_alpha * (main_loss / tau.clamp_min(torch.finfo(tau.dtype).tiny) + pi_gamma * surprise))


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Int[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """(-log softmax(logits) at the label, entropy of the softmax, most probable token, -log of its probability).

    Losses and entropies are in nats, and 0 where the label is -100. Only the first has a gradient.

    Raises:
        ValueError: labels of another dtype or shape.
        IndexError: a label that is neither -100 nor a token.
    """
    check_indices("labels", labels, 0, logits.shape[-1], shape=logits.shape[:-1], ignore=IGNORE_INDEX)
    losses, entropies, best, log_sums = CROSS_ENTROPY(logits, labels)
    return losses, entropies, best, log_sums


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Values:
    is_target = labels != IGNORE_INDEX
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    detached = log_p.detach()
    entropy = -reduce(detached.exp() * detached, "... vocab -> ...", "sum")
    losses, entropies = (torch.where(is_target, x, 0.0) for x in (-picked, entropy))
    return losses, entropies, detached.argmax(dim=-1), -detached.amax(dim=-1)


CROSS_ENTROPY = fused(
    reference=cross_entropy_reference,
    kernel=step_kernels.cross_entropy,
    kernel_grad=lambda grads, inputs, outputs: (
        step_kernels.cross_entropy_grad(grads[0], *inputs, *outputs[2:]),
    ),
    smooth=1,
)  # fmt: skip
