"""Causal grouped-query attention with QK norm, as in Qwen3: projections, heads with rotary positions, softmax."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tiny_onn_func.config import ModelConfig
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.ops import rms_norm, rotate
from tiny_onn_func.primitives.function import PositionalFunction
from tiny_onn_func.primitives.fused import Values, fused
from tiny_onn_func.primitives.grouped import dense_matmul
from tiny_onn_func.primitives.vmap import drop_repeated_axes, only_vmaps, outside_vmap, runs_first


def causal_bias(
    attention_mask: Tensor | None, seq: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "*runs #batch seq seq"]:
    """Build the additive attention bias: 0 where key j <= query i and token j is real, else the dtype's minimum.

    A mask of numbers beyond 1 (packed rows) keeps documents apart: a token sees keys of its own number only. One mask
    of all runs makes one bias. Added, not filled in: an addition has no backward of its own and takes it without a copy
    for every run.
    """
    visible = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()[None]
    if attention_mask is not None:
        mask = drop_repeated_axes(attention_mask, 2)
        key, query = mask.unsqueeze(-2), mask.unsqueeze(-1)
        visible = visible & (key != 0) & ((key == query) | (query == 0))
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def attention(
    x: Float[Tensor, "*runs batch seq dim"],
    params: Mapping[str, Tensor],
    rotary: tuple[Tensor, Tensor],
    bias: Float[Tensor, "*#runs #batch seq seq"],
    config: ModelConfig,
    values: Float[Tensor, "*runs batch seq all_groups"] | None = None,
) -> Float[Tensor, "*runs batch seq dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, every group of query heads sharing one key and value head.

    A query that sees no key at all (padding on the left) gets a finite value that nobody reads.

    Args:
        values: what is added to v (value embeddings: Zhou et al. 2024, arXiv 2410.17897, keyed by the token).
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    runs, batch, dim = x.shape[:-3], x.shape[-3], config.head_dim
    tokens = rearrange(x, "... batch seq dim -> ... (batch seq) dim")
    qkv = dense_matmul(tokens, torch.cat([params[name] for name in ("q_proj", "k_proj", "v_proj")], dim=-1))
    q_norm = params["q_norm"] / math.sqrt(config.head_dim)  # a few numbers to scale, where the scores are many
    each = ((q_norm, heads), (params["k_norm"], groups))
    norms = torch.cat([norm.unsqueeze(-2).expand(*runs, count, dim) for norm, count in each], dim=-2)
    by_head = rearrange(qkv, "... (batch seq) (heads dim) -> ... batch seq heads dim", batch=batch, dim=dim)
    q, k, v = split_heads(by_head, norms, rotary, config.rms_norm_eps)
    if values is not None:
        v = v + rearrange(values, "... seq (groups dim) -> ... groups seq dim", groups=groups)
    q = rearrange(q, "... (groups share) seq dim -> ... groups share seq dim", groups=groups)
    out = attend(q, k, v, bias)
    out = rearrange(out, "... batch seq groups share dim -> ... (batch seq) (groups share dim)")
    return rearrange(dense_matmul(out, params["o_proj"]), "... (batch seq) dim -> ... batch seq dim", batch=batch)


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
    """Split qkv into heads: q and k are normed, scaled and rotated by their positions' angles, v is unchanged.

    Args:
        qkv: heads of q, as many groups of k as there are more norms, and as many of v.
        rotary: as `rotary_angles` gives them; the kernel takes angles that all of a batch share.
    """
    cosines, sines = (t.view(-1, *t.shape[-2:]) for t in rotary)
    q, k, v = (SPLIT_HEADS if rotary[0].ndim == 2 else split_heads_reference)(qkv, norms, cosines, sines, eps)
    return q, k, v


def split_heads_reference(qkv: Tensor, norms: Tensor, cosines: Tensor, sines: Tensor, eps: float) -> Values:
    groups = qkv.shape[-2] - norms.shape[-2]
    by_head = rearrange(qkv, "... seq heads dim -> ... heads seq dim")
    qk, v = by_head.split((norms.shape[-2], groups), dim=-3)
    qk = rms_norm(qk, None, eps) * rearrange(norms, "... heads dim -> ... 1 heads 1 dim")
    turned = rotate(qk, cosines, sines)
    q, k = turned.split((norms.shape[-2] - groups, groups), dim=-3)
    return q, k, v


def _shared(t: Tensor, runs: torch.Size) -> Tensor:
    """The one tensor that all runs share."""
    return t.flatten(0, -3)[0]


SPLIT_HEADS = fused(
    reference=split_heads_reference, kernel=forward_kernels.split_heads,
    kernel_grad=lambda grads, inputs, _: forward_kernels.split_heads_grad(grads, *inputs),
    dims=(4, 2, _shared, _shared), out_dims=(4, 4, 4), floats=2, smooth=3,
)  # fmt: skip


def attend(
    q: Float[Tensor, "*runs batch groups share seq dim"],
    k: Float[Tensor, "*runs batch groups seq dim"],
    v: Float[Tensor, "*runs batch groups seq dim"],
    bias: Float[Tensor, "*#runs #batch seq seq"],
) -> Float[Tensor, "*runs batch seq groups share dim"]:
    """Attend every query to its keys: softmax of the biased scores, times v; `share` query heads use one key head.

    Args:
        bias: added to the scores, the dtype's minimum on what may not be seen; later keys never are.
    """
    if _uses_library(q):
        return outside_vmap(lambda *plain: (_attend_by_library(*plain),), q, k, v, bias)[0]
    return ATTEND(q, k, v, bias)[0]


def _uses_library(q: Tensor) -> bool:
    """True on accelerators outside of transforms that differentiate, which may ask for second derivatives."""
    return q.device.type != "cpu" and only_vmaps()


def _attend_by_library(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend by `scaled_dot_product_attention`: no score matrix where the device has a kernel. It has one derivative.

    Nobody sees what padding is; but a key that only some queries may not see, a later one, makes theirs NaN, too, where
    its score is +inf or it is no number.
    """
    *runs, batch, groups, share, seq, dim = q.shape
    hidden, sees = _hidden(bias)
    k, v = (_without_padding(t, hidden) for t in (k, v))
    # -inf, not the dtype's minimum: beside it a lower score would be seen; a row of -inf alone would have no softmax
    bias = bias.masked_fill(hidden, -torch.inf).masked_fill(~sees, 0.0)
    heads = q.reshape(-1, groups * share, seq, dim)
    keys, values = (t.unsqueeze(-3).expand(*runs, batch, groups, share, seq, dim).reshape(heads.shape) for t in (k, v))
    mask = bias.expand(*runs, batch, seq, seq).reshape(-1, 1, seq, seq)
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=1.0)
    out = out.reshape(q.shape) * rearrange(sees, "... i j -> ... 1 1 i j")
    return rearrange(out, "... groups share i dim -> ... i groups share dim")


def _hidden(bias: Tensor) -> tuple[Tensor, Tensor]:
    """(True for masked keys, True for queries that see a key)."""
    hidden = bias <= torch.finfo(bias.dtype).min
    return hidden, ~hidden.all(dim=-1, keepdim=True)


def _without_padding(t: Tensor, hidden: Tensor) -> Tensor:
    """Zero the keys or values that no query sees: they may be NaN, and 0 * NaN is NaN."""
    return torch.where(rearrange(hidden.all(dim=-2), "... j -> ... 1 j 1"), 0.0, t)


class HideScores(PositionalFunction):
    """scores + bias, and -inf on masked keys, or 0 for a query that sees none.

    The gradient is that of scores + bias, which costs nothing: that of a softmax is 0 where a share is.
    """

    @staticmethod
    def forward(scores: Tensor, bias: Tensor) -> Tensor:
        hidden, sees = _hidden(bias)
        return torch.where(hidden, torch.where(sees, -torch.inf, 0.0).to(scores.dtype), scores + bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save nothing for the backward pass."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, dot: Tensor, _: Any) -> Tensor:
        return dot.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], scores: Tensor, bias: Tensor) -> Any:
        return HideScores.apply(*runs_first(info.batch_size, in_dims, scores, bias)), 0  # type: ignore[no-untyped-call]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Values:
    """Attention output, and the log of each softmax's sum, which saves the kernel's backward a pass.

    A masked key gets exactly 0, whatever its score is and however low those of the others; a query whose keys are all
    masked gets 0. A value that is no number reaches every query of its row unless it is padding: 0 times it is none.
    """
    hidden, sees = _hidden(bias)
    v, sees = _without_padding(v, hidden), rearrange(sees, "... i j -> ... 1 1 i j")
    scores = einsum(q, k, "... share i dim, ... j dim -> ... share i j")
    scores = HideScores.apply(scores, rearrange(bias, "... i j -> ... 1 1 i j"))  # type: ignore[no-untyped-call]
    out = einsum(scores.softmax(dim=-1), v, "... share i j, ... j dim -> ... share i dim") * sees
    log_sums = scores.detach().logsumexp(dim=-1).masked_fill(~sees.squeeze(-1), -torch.inf)
    return rearrange(out, "... groups share i dim -> ... i groups share dim"), log_sums


def _masks(bias: Tensor, runs: torch.Size) -> Tensor:
    """(masks, seq, seq): the bias of all runs' batches, or of one run's where all runs share it."""
    own = bias.shape[:-3]
    if all(size == 1 or stride == 0 for size, stride in zip(own, bias.stride(), strict=False)):
        return bias[(0,) * len(own)]
    return bias.expand(*runs, -1, -1).reshape(-1, *bias.shape[-2:])


def _attend_grad(grads: Values, inputs: Values, outputs: Values) -> Values:
    (q, k, v, bias), (out, log_sums) = inputs, outputs
    return forward_kernels.attention_grad(q, k, v, bias, out, log_sums, grads[0])


ATTEND = fused(
    reference=attend_reference, kernel=forward_kernels.attention,
    kernel_grad=_attend_grad,
    dims=(4, 3, 3, _masks), out_dims=(4, 3), floats=3, smooth=1,
)  # fmt: skip
