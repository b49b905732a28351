"""Kernels of the model: experts, attention, norms; functions of float32 CPU tensors."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor

from tiny_onn_func.kernels.runtime import loaded

PARTS = 16  # of a run's rows, whose sums are made apart


def matmul(
    pairs: Sequence[tuple[Float[Tensor, "runs rows _"], Float[Tensor, "runs experts _ out_dim"]]],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs rows out_dim"]:
    """Each row times the weights of its expert, summed over one or two pairs of the same sizes; zeros behind the last
    offset. Transposed weights are taken as they lie."""
    transposed = all(weights[0].mT.is_contiguous() for _, weights in pairs)
    apart = pairs[0][1].stride(0)
    as_they_lie = all((transposed or w[0].is_contiguous()) and w.stride(0) == apart for _, w in pairs)
    if not as_they_lie:
        transposed, apart = False, pairs[0][1][0].numel()
    dense = [(rows.contiguous(), weights if as_they_lie else weights.contiguous()) for rows, weights in pairs]
    (rows, weights), (others, other_weights) = dense[0], (*dense, (None, None))[1]
    runs, experts, in_dim, out_dim = weights.shape
    offsets, out = offsets.contiguous(), rows.new_empty(runs, rows.shape[1], out_dim)
    sizes = runs, rows.shape[1], experts, in_dim, out_dim, rows.shape[1]
    given = (None if t is None else t.data_ptr() for t in (rows, None, weights, others, other_weights))
    made = offsets.data_ptr(), out.data_ptr()
    if loaded().grouped_matmul(*sizes, *given, apart, *made, transposed, torch.get_num_threads()):
        raise MemoryError("grouped_matmul: expected memory for one expert's weights, got none; use a smaller batch")
    return out


def outer(
    rows: Float[Tensor, "runs rows in_dim"],
    grads: Float[Tensor, "runs rows out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs experts in_dim out_dim"]:
    """The sum of rows[n]^T grads[n] over each expert's rows."""
    rows, grads, offsets = rows.contiguous(), grads.contiguous(), offsets.contiguous()
    runs, count, in_dim = rows.shape
    out = rows.new_empty(runs, offsets.shape[1], in_dim, grads.shape[2])
    sizes = runs, count, offsets.shape[1], in_dim, grads.shape[2], count
    pointers = (None if t is None else t.data_ptr() for t in (rows, None, grads, offsets, out))
    loaded().grouped_outer(*sizes, *pointers, torch.get_num_threads())
    return out


def token_matmul(
    x: Float[Tensor, "runs tokens in_dim"],
    token: Int64[Tensor, "runs rows"],
    weights: Float[Tensor, "runs experts in_dim out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs rows out_dim"]:
    """`matmul` of the rows x[token], which are not made."""
    x, token, offsets = x.contiguous(), token.contiguous(), offsets.contiguous()
    weights = weights if weights[0].is_contiguous() else weights.contiguous()
    runs, experts, in_dim, out_dim = weights.shape
    out = x.new_empty(runs, token.shape[1], out_dim)
    given = x.data_ptr(), token.data_ptr(), weights.data_ptr(), None, None
    made = offsets.data_ptr(), out.data_ptr()
    sizes = runs, token.shape[1], experts, in_dim, out_dim, x.shape[1]
    loaded().grouped_matmul(*sizes, *given, weights.stride(0), *made, 0, torch.get_num_threads())
    return out


def token_outer(
    x: Float[Tensor, "runs tokens in_dim"],
    token: Int64[Tensor, "runs rows"],
    grads: Float[Tensor, "runs rows out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs experts in_dim out_dim"]:
    """`outer` of the rows x[token], which are not made."""
    given = [t.contiguous() for t in (x, token, grads, offsets)]
    (runs, tokens, in_dim), (_, count, out_dim) = x.shape, grads.shape
    out = x.new_empty(runs, offsets.shape[1], in_dim, out_dim)
    sizes = runs, count, offsets.shape[1], in_dim, out_dim, tokens
    loaded().grouped_outer(*sizes, *(t.data_ptr() for t in (*given, out)), torch.get_num_threads())
    return out


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    loaded().swiglu(gate.numel(), gate.data_ptr(), up.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def swiglu_grad(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Gradients of silu(gate) * up in gate and up."""
    given = [t.contiguous() for t in (grad, gate, up)]
    made = torch.empty_like(given[1]), torch.empty_like(given[2])
    loaded().swiglu_grad(gate.numel(), *(t.data_ptr() for t in (*given, *made)), torch.get_num_threads())
    return made


def scaled_rows(
    x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens slots"], order: Int[Tensor, " rows"]
) -> Float[Tensor, "rows dim"]:
    """rows[n] = x[order[n] // slots] * weights.flatten()[order[n]]."""
    given = [t.contiguous() for t in (x, weights, order)]
    (count,), (dim, slots) = order.shape, (x.shape[1], weights.shape[1])
    rows = x.new_empty(count, dim)
    pointers = (t.data_ptr() for t in (*given, rows))
    loaded().scaled_rows(count, dim, slots, *pointers, torch.get_num_threads())
    return rows


def combined_rows(
    y: Float[Tensor, "rows dim"], weights: Float[Tensor, "tokens slots"], inverse: Int64[Tensor, " rows"]
) -> Float[Tensor, "tokens dim"]:
    """The sum over slots of weights[t, m] * y[inverse[t * slots + m]]."""
    given = [t.contiguous() for t in (y, weights, inverse)]
    out = y.new_empty(weights.shape[0], y.shape[1])
    pointers = (t.data_ptr() for t in (*given, out))
    loaded().combined_rows(*out.shape, weights.shape[1], *pointers, torch.get_num_threads())
    return out


def sort_rows(
    expert_ids: Int64[Tensor, "*runs tokens slots"], active: Bool[Tensor, "*runs tokens slots"], num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order, inverse, expert, offsets) of the (token, slot) pairs sorted by expert, stably, inactive ones last."""
    ids, active = expert_ids.contiguous(), active.contiguous()
    runs, rows = ids.shape[:-2], ids.shape[-2] * ids.shape[-1]
    order, inverse, expert = (ids.new_empty(*runs, rows) for _ in range(3))
    offsets = ids.new_empty(*runs, num_experts, dtype=torch.int32)
    pointers = (t.data_ptr() for t in (ids, active, order, inverse, expert, offsets))
    loaded().sort_rows(math.prod(runs), rows, num_experts, *pointers, torch.get_num_threads())
    return order, inverse, expert, offsets


def rms_norm(x: Float[Tensor, "runs rows dim"], weight: Float[Tensor, "runs dim"], eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    pointers = (t.data_ptr() for t in (x, weight, out))
    loaded().rms_norm(*x.shape, eps, *pointers, torch.get_num_threads())
    return out


def rms_norm_grad(
    grad: Float[Tensor, "runs rows dim"],
    x: Float[Tensor, "runs rows dim"],
    weight: Float[Tensor, "runs dim"],
    eps: float,
) -> tuple[Float[Tensor, "runs rows dim"], Float[Tensor, "runs dim"]]:
    """Gradients of `rms_norm` in x and weight."""
    given = [t.contiguous() for t in (x, weight, grad)]
    parts = max(1, min(PARTS, x.shape[1] // PARTS))
    grad_x, partial = torch.empty_like(given[0]), x.new_empty(x.shape[0], parts, x.shape[2])
    pointers = (t.data_ptr() for t in (*given, grad_x, partial))
    loaded().rms_norm_grad(*x.shape, parts, eps, *pointers, torch.get_num_threads())
    return grad_x, partial[:, 0]


def split_heads(
    qkv: Float[Tensor, "runs batch seq all_heads dim"],
    norms: Float[Tensor, "runs normed dim"],
    cosines: Float[Tensor, "seq dim"],
    sines: Float[Tensor, "seq dim"],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (runs, batch, heads, seq, dim), k and v (runs, batch, groups, seq, dim): q and k normed and turned."""
    given = [t.contiguous() for t in (qkv, norms, cosines, sines)]
    runs, batch, seq, width, dim = qkv.shape
    groups = width - norms.shape[1]
    made = [qkv.new_empty(runs, batch, some, seq, dim) for some in (width - 2 * groups, groups, groups)]
    pointers = (t.data_ptr() for t in (*given, *made))
    sizes = runs, batch, seq, width - 2 * groups, groups, dim
    loaded().split_heads(*sizes, eps, *pointers, torch.get_num_threads())
    return made[0], made[1], made[2]


def split_heads_grad(
    grads: Sequence[Float[Tensor, "runs batch _ seq dim"]],
    qkv: Float[Tensor, "runs batch seq all_heads dim"],
    norms: Float[Tensor, "runs normed dim"],
    cosines: Float[Tensor, "seq dim"],
    sines: Float[Tensor, "seq dim"],
    eps: float,
) -> tuple[Float[Tensor, "runs batch seq all_heads dim"], Float[Tensor, "runs normed dim"]]:
    """Gradients of `split_heads` in qkv and norms."""
    given = [t.contiguous() for t in (qkv, norms, cosines, sines, *grads)]
    runs, batch, seq, width, dim = qkv.shape
    groups = width - norms.shape[1]
    grad_qkv, grad_norms = torch.empty_like(given[0]), qkv.new_empty(runs, batch, width - groups, dim)
    room = qkv.new_empty(runs, batch, dim)
    pointers = (t.data_ptr() for t in (*given, grad_qkv, grad_norms, room))
    sizes = runs, batch, seq, width - 2 * groups, groups, dim
    loaded().split_heads_grad(*sizes, eps, *pointers, torch.get_num_threads())
    return grad_qkv, grad_norms.sum(dim=1)


def attention(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "masks seq seq"],
) -> tuple[Float[Tensor, "batch seq groups share dim"], Float[Tensor, "batch groups share seq"]]:
    """Causal softmax(q k^T + bias) v and the log of each softmax's sum; fewer masks than batches are used again."""
    given = [t.contiguous() for t in (q, k, v, bias)]
    batch, groups, share, seq, dim = q.shape
    out, log_sums = q.new_empty(batch, seq, groups, share, dim), q.new_empty(q.shape[:-1])
    pointers = [t.data_ptr() for t in given]
    made = (out.data_ptr(), log_sums.data_ptr(), torch.get_num_threads())
    if loaded().attention(*q.shape, *pointers, bias.shape[0], *made):
        raise MemoryError("attention: expected memory for one head's scores, got none; use a smaller sequence_length")
    return out, log_sums


def attention_grad(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "masks seq seq"],
    out: Float[Tensor, "batch seq groups share dim"],
    log_sums: Float[Tensor, "batch groups share seq"],
    grad: Float[Tensor, "batch seq groups share dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` in q, k and v."""
    given = [t.contiguous() for t in (q, k, v, bias)]
    known = [t.contiguous() for t in (out, log_sums, grad)]
    made = torch.empty_like(given[0]), torch.empty_like(given[1]), torch.empty_like(given[2])
    pointers, more = [t.data_ptr() for t in given], [t.data_ptr() for t in (*known, *made)]
    if loaded().attention_grad(*q.shape, *pointers, bias.shape[0], *more, torch.get_num_threads()):
        raise MemoryError("attention: expected memory for one head's scores, got none; use a smaller sequence_length")
    return made


def choose(
    logits: Float[Tensor, "runs tokens experts"],
    bias: Float[Tensor, "runs experts"],
    budgets: Float64[Tensor, " runs"],
    real: Bool[Tensor, "runs tokens"],
    *,
    slots: int,
    least: int,
    dynamic: bool,
) -> tuple[Float[Tensor, "runs tokens slots"], Int64[Tensor, "runs tokens slots"], Bool[Tensor, "runs tokens slots"]]:
    """(weights, expert_ids, active): the experts of the largest softmax + bias, and the softmax of those that are kept.

    Args:
        least: experts that are kept in any case, where `dynamic` keeps those that the budget leaves.
    """
    given = [t.contiguous() for t in (logits, bias, budgets, real)]
    runs, tokens, experts = logits.shape
    weights = logits.new_empty(runs, tokens, slots)
    made = weights, torch.empty_like(weights, dtype=torch.int64), torch.empty_like(weights, dtype=torch.bool)
    pointers = (t.data_ptr() for t in (*given, *made))
    if loaded().choose(runs, tokens, experts, slots, least, dynamic, *pointers, torch.get_num_threads()):
        raise MemoryError("choose: expected memory for one token's experts, got none; use fewer experts")
    return made
