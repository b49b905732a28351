"""Cross entropy of every token, with the entropy and the mode of its distribution from the same pass."""

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.primitives.fused import Twin, Values, with_kernel
from training.batch import IGNORE_INDEX


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Int[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """(-log softmax(logits) at the label, entropy of the softmax, most probable token, log of the softmax's sum).

    Losses and entropies are in nats, and 0 where the label is -100. Only the first has a gradient.
    """
    losses, entropies, best, log_sums = _cross_entropy(logits, labels)
    return losses, entropies, best, log_sums


def plain(logits: Tensor, labels: Tensor) -> Values:
    is_target = labels != IGNORE_INDEX
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    seen = log_p.detach()
    entropy = -reduce(seen.exp() * seen, "... vocab -> ...", "sum")
    losses, entropies = (torch.where(is_target, x, 0.0) for x in (-picked, entropy))
    return losses, entropies, seen.argmax(dim=-1), logits.detach().logsumexp(dim=-1)


def _kernel_grad(grads: Values, inputs: Values, outputs: Values) -> Values:
    logits, labels = inputs
    return (step_kernels.cross_entropy_grad(grads[0], logits, labels, outputs[3]),)


CROSS_ENTROPY = Twin(plain, step_kernels.cross_entropy, _kernel_grad, differentiable=1, smooth=1)
_cross_entropy = with_kernel(CROSS_ENTROPY)
