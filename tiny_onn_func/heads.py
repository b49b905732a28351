"""The three projections in one -> queries, keys and values by head: QK norm and rotary positions, as in Qwen3."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func import kernels
from tiny_onn_func.folding import one_axis
from tiny_onn_func.ops import rms_norm, rotate
from tiny_onn_func.twins import Twin, Values, with_kernel


def split_heads(
    qkv: Float[Tensor, "*runs batch seq all_heads dim"],
    norms: Float[Tensor, "*runs normed dim"],
    rotary: tuple[Float[Tensor, "*#batch seq dim"], Float[Tensor, "*#batch seq dim"]],
    eps: float,
) -> tuple[
    Float[Tensor, "*runs batch heads seq dim"],
    Float[Tensor, "*runs batch groups seq dim"],
    Float[Tensor, "*runs batch groups seq dim"],
]:
    """q and k normed, times their head's norms, and turned by their positions' angles; v as it is.

    Args:
        qkv: heads of q, as many groups of k as there are more norms, and as many of v.
        rotary: as `rotary_angles` gives them; the kernel takes angles that all of a batch share.
    """
    cosines, sines = (t.view(-1, *t.shape[-2:]) for t in rotary)
    q, k, v = (_split_heads if rotary[0].ndim == 2 else plain)(qkv, norms, cosines, sines, eps)
    return q, k, v


def plain(qkv: Tensor, norms: Tensor, cosines: Tensor, sines: Tensor, eps: float) -> Values:
    groups = qkv.shape[-2] - norms.shape[-2]
    by_head = rearrange(qkv, "... seq heads dim -> ... heads seq dim")
    qk, v = by_head.split((norms.shape[-2], groups), dim=-3)
    qk = rms_norm(qk, None, eps) * rearrange(norms, "... heads dim -> ... 1 heads 1 dim")
    turned = rotate(qk, cosines, sines)
    q, k = turned.split((norms.shape[-2] - groups, groups), dim=-3)
    return q, k, v


def _kernel(qkv: Tensor, norms: Tensor, cosines: Tensor, sines: Tensor, eps: float) -> Values:
    made = kernels.split_heads(*_one_run(qkv, norms, cosines, sines), eps)
    return tuple(t.view(*qkv.shape[:-3], *t.shape[2:]) for t in made)


def _kernel_grad(grads: Values, inputs: Values, outputs: Values) -> Values:
    qkv, norms, cosines, sines, eps = inputs
    folded = [one_axis(grad, 4) for grad in grads]
    grad_qkv, grad_norms = kernels.split_heads_grad(folded, *_one_run(qkv, norms, cosines, sines), eps)
    return grad_qkv.view(qkv.shape), grad_norms.view(norms.shape)


def _one_run(qkv: Tensor, norms: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All leading axes as one of runs; the angles are those of all."""
    cosines, sines = (t.flatten(0, -3)[0] for t in (cosines, sines))
    return one_axis(qkv, 4), one_axis(norms, 2), cosines, sines


SPLIT_HEADS = Twin(plain, _kernel, _kernel_grad, differentiable=2, smooth=3)
_split_heads = with_kernel(SPLIT_HEADS)
