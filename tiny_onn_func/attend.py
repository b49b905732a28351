"""softmax(q k^T + bias) v."""

from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func import kernels
from tiny_onn_func.folding import one_axis
from tiny_onn_func.twins import Twin, Values, with_kernel


def attend(
    q: Float[Tensor, "*runs batch groups share seq dim"],
    k: Float[Tensor, "*runs batch groups seq dim"],
    v: Float[Tensor, "*runs batch groups seq dim"],
    bias: Float[Tensor, "*#runs #batch seq seq"],
) -> Float[Tensor, "*runs batch seq groups share dim"]:
    """What each query takes from the values; `share` queries have one key and value.

    Args:
        bias: added to the scores, the dtype's minimum on what may not be seen; later keys never are.
    """
    return _attend(q, k, v, bias)[0]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Values:
    """The values, and logarithms of the softmaxes' sums: they save the kernel's backward a pass."""
    scores = einsum(q, k, "... share i dim, ... j dim -> ... share i j") + bias.unsqueeze(-3).unsqueeze(-3)
    out = einsum(scores.softmax(dim=-1), v, "... share i j, ... j dim -> ... share i dim")
    return rearrange(out, "... groups share i dim -> ... i groups share dim"), scores.detach().logsumexp(dim=-1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Values:
    out, log_sums = kernels.attention(one_axis(q, 4), one_axis(k, 3), one_axis(v, 3), _masks(q, bias))
    return out.reshape(*q.shape[:-4], *out.shape[1:]), log_sums.view(q.shape[:-1])


def _kernel_grad(grads: Values, inputs: Values, outputs: Values) -> Values:
    q, k, v, bias = inputs
    out, log_sums = outputs
    made = kernels.attention_grad(
        one_axis(q, 4), one_axis(k, 3), one_axis(v, 3), _masks(q, bias),
        one_axis(out, 4), one_axis(log_sums, 3), one_axis(grads[0], 4),
    )  # fmt: skip
    return tuple(grad.view(t.shape) for grad, t in zip(made, (q, k, v), strict=True))


ATTEND = Twin(plain, _kernel, _kernel_grad, differentiable=3, smooth=1)
_attend = with_kernel(ATTEND)


def _masks(q: Tensor, bias: Tensor) -> Tensor:
    """The bias of all runs' batches, or what all runs share of it."""
    runs = bias.shape[:-3]
    if all(size == 1 or stride == 0 for size, stride in zip(runs, bias.stride(), strict=False)):
        return bias[(0,) * len(runs)]
    return bias.expand(*q.shape[:-4], -1, -1).reshape(-1, *bias.shape[-2:])
