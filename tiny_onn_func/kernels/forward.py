"""Kernels of the model: experts, attention, norms; functions of float32 CPU tensors."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor

from tiny_onn_func.kernels.runtime import check, loaded, refuse, threads

PARTS = 16  # of a run's rows, whose sums are made apart
F32, F64, I64, I32, BOOL = torch.float32, torch.float64, torch.int64, torch.int32, torch.bool
WEIGHTS = "one expert's weights, got none; use a smaller batch"
SCORES = "one head's scores, got none; use a smaller sequence_length"


def _ends(rows: int) -> str:
    return f"offsets that ascend from 0 to {rows} at most"


def matmul(
    pairs: Sequence[tuple[Float[Tensor, "runs rows _"], Float[Tensor, "runs experts _ out_dim"]]],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs rows out_dim"]:
    """Grouped matmul: multiply each row by the weights of its expert, and add up one or two such products.

    Rows behind the last offset give zeros. Transposed weights are not copied.

    Raises:
        ValueError: no pair or more than two; a tensor of another shape or dtype.
    """
    if len(pairs) not in (1, 2):
        raise ValueError(f"grouped_matmul: expected one or two pairs of rows and weights, got {len(pairs)}")
    (runs, experts, in_dim, out_dim), count = pairs[0][1].shape, pairs[0][0].shape[1]
    for rows, weights in pairs:
        read = {"rows": (rows, (runs, count, in_dim), F32), "weights": (weights, (runs, experts, in_dim, out_dim), F32)}
        check("grouped_matmul", **read, offsets=(offsets, (runs, experts), I32))
    transposed = all(weights[:1].mT.is_contiguous() for _, weights in pairs)
    apart = pairs[0][1].stride(0)
    as_they_lie = all((transposed or w[:1].is_contiguous()) and w.stride(0) == apart for _, w in pairs)
    if not as_they_lie:
        transposed, apart = False, experts * in_dim * out_dim
    dense = [(rows.contiguous(), weights if as_they_lie else weights.contiguous()) for rows, weights in pairs]
    (rows, weights), (others, other_weights) = dense[0], (*dense, (None, None))[1]
    offsets, out = offsets.contiguous(), rows.new_empty(runs, count, out_dim)
    sizes = runs, count, experts, in_dim, out_dim, count
    pointers = (None if t is None else t.data_ptr() for t in (rows, None, weights, others, other_weights))
    more = offsets.data_ptr(), out.data_ptr()
    if code := loaded().grouped_matmul(*sizes, *pointers, apart, *more, transposed, threads()):
        refuse("grouped_matmul", code, _ends(count), WEIGHTS)
    return out


def outer(
    rows: Float[Tensor, "runs rows in_dim"],
    grads: Float[Tensor, "runs rows out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs experts in_dim out_dim"]:
    """The sum of rows[n]^T grads[n] over each expert's rows."""
    (runs, count, in_dim), experts, out_dim = rows.shape, offsets.shape[-1], grads.shape[-1]
    read = {"rows": (rows, (runs, count, in_dim), F32), "grads": (grads, (runs, count, out_dim), F32)}
    check("grouped_outer", **read, offsets=(offsets, (runs, experts), I32))
    rows, grads, offsets = rows.contiguous(), grads.contiguous(), offsets.contiguous()
    out = rows.new_empty(runs, experts, in_dim, out_dim)
    sizes = runs, count, experts, in_dim, out_dim, count
    pointers = (None if t is None else t.data_ptr() for t in (rows, None, grads, offsets, out))
    if code := loaded().grouped_outer(*sizes, *pointers, threads()):
        refuse("grouped_outer", code, _ends(count))
    return out


def token_matmul(
    x: Float[Tensor, "runs tokens in_dim"],
    token: Int64[Tensor, "runs rows"],
    weights: Float[Tensor, "runs experts in_dim out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs rows out_dim"]:
    """`matmul` of the rows x[token], which are not made."""
    (runs, experts, in_dim, out_dim), tokens, count = weights.shape, x.shape[1], token.shape[-1]
    read = {"x": (x, (runs, tokens, in_dim), F32), "token": (token, (runs, count), I64)}
    sized = {"weights": (weights, (runs, experts, in_dim, out_dim), F32), "offsets": (offsets, (runs, experts), I32)}
    check("grouped_matmul", **read, **sized)
    x, token, offsets = x.contiguous(), token.contiguous(), offsets.contiguous()
    weights = weights if weights[:1].is_contiguous() else weights.contiguous()
    out = x.new_empty(runs, count, out_dim)
    pointers = x.data_ptr(), token.data_ptr(), weights.data_ptr(), None, None
    more = offsets.data_ptr(), out.data_ptr()
    sizes = runs, count, experts, in_dim, out_dim, tokens
    if code := loaded().grouped_matmul(*sizes, *pointers, weights.stride(0), *more, 0, threads()):
        refuse("grouped_matmul", code, f"token in [0, {tokens}) and {_ends(count)}", WEIGHTS)
    return out


def token_outer(
    x: Float[Tensor, "runs tokens in_dim"],
    token: Int64[Tensor, "runs rows"],
    grads: Float[Tensor, "runs rows out_dim"],
    offsets: Int32[Tensor, "runs experts"],
) -> Float[Tensor, "runs experts in_dim out_dim"]:
    """`outer` of the rows x[token], which are not made."""
    (runs, tokens, in_dim), (_, count, out_dim), experts = x.shape, grads.shape, offsets.shape[-1]
    read = {"x": (x, (runs, tokens, in_dim), F32), "token": (token, (runs, count), I64)}
    check("grouped_outer", **read, grads=(grads, (runs, count, out_dim), F32), offsets=(offsets, (runs, experts), I32))
    inputs = [t.contiguous() for t in (x, token, grads, offsets)]
    out = x.new_empty(runs, experts, in_dim, out_dim)
    sizes = runs, count, experts, in_dim, out_dim, tokens
    if code := loaded().grouped_outer(*sizes, *(t.data_ptr() for t in (*inputs, out)), threads()):
        refuse("grouped_outer", code, f"token in [0, {tokens}) and {_ends(count)}")
    return out


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up."""
    check("swiglu", gate=(gate, gate.shape, F32), up=(up, gate.shape, F32))
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    loaded().swiglu(gate.numel(), gate.data_ptr(), up.data_ptr(), out.data_ptr(), threads())
    return out


def swiglu_grad(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Gradients of silu(gate) * up in gate and up."""
    check("swiglu_grad", grad=(grad, gate.shape, F32), gate=(gate, gate.shape, F32), up=(up, gate.shape, F32))
    inputs = [t.contiguous() for t in (grad, gate, up)]
    grads = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    loaded().swiglu_grad(gate.numel(), *(t.data_ptr() for t in (*inputs, *grads)), threads())
    return grads


def scaled_rows(
    x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens slots"], order: Int[Tensor, " rows"]
) -> Float[Tensor, "rows dim"]:
    """Gather the token of each row, scaled: x[order[n] // slots] * weights.flatten()[order[n]]."""
    (tokens, dim), slots, (count,) = x.shape, weights.shape[-1], order.shape
    read = {"x": (x, (tokens, dim), F32), "weights": (weights, (tokens, slots), F32)}
    check("scaled_rows", **read, order=(order, (count,), I64))
    inputs = [t.contiguous() for t in (x, weights, order)]
    rows = x.new_empty(count, dim)
    pointers = (t.data_ptr() for t in (*inputs, rows))
    if code := loaded().scaled_rows(count, dim, slots, tokens, *pointers, threads()):
        refuse("scaled_rows", code, f"order in [0, {tokens * slots})")
    return rows


def combined_rows(
    y: Float[Tensor, "rows dim"], weights: Float[Tensor, "tokens slots"], inverse: Int64[Tensor, " rows"]
) -> Float[Tensor, "tokens dim"]:
    """The sum over slots of weights[t, m] * y[inverse[t * slots + m]]."""
    (rows, dim), (tokens, slots) = y.shape, weights.shape
    read = {"y": (y, (rows, dim), F32), "weights": (weights, (tokens, slots), F32)}
    check("combined_rows", **read, inverse=(inverse, (tokens * slots,), I64))
    inputs = [t.contiguous() for t in (y, weights, inverse)]
    out = y.new_empty(tokens, dim)
    pointers = (t.data_ptr() for t in (*inputs, out))
    if code := loaded().combined_rows(tokens, dim, slots, rows, *pointers, threads()):
        refuse("combined_rows", code, f"inverse in [0, {rows})")
    return out


def sort_rows(
    expert_ids: Int64[Tensor, "*runs tokens slots"], active: Bool[Tensor, "*runs tokens slots"], num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order, inverse, expert, offsets) of the (token, slot) pairs sorted by expert, stably, inactive ones last."""
    shape = expert_ids.shape
    check("sort_rows", expert_ids=(expert_ids, shape, I64), active=(active, shape, BOOL))
    ids, active = expert_ids.contiguous(), active.contiguous()
    runs, rows = ids.shape[:-2], ids.shape[-2] * ids.shape[-1]
    order, inverse, expert = (ids.new_empty(*runs, rows) for _ in range(3))
    offsets = ids.new_empty(*runs, num_experts, dtype=torch.int32)
    pointers = (t.data_ptr() for t in (ids, active, order, inverse, expert, offsets))
    if code := loaded().sort_rows(math.prod(runs), rows, num_experts, *pointers, threads()):
        refuse("sort_rows", code, f"expert_ids in [0, {num_experts}) where active")
    return order, inverse, expert, offsets


def rms_norm(x: Float[Tensor, "runs rows dim"], weight: Float[Tensor, "runs dim"], eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    check("rms_norm", x=(x, x.shape, F32), weight=(weight, (x.shape[0], x.shape[2]), F32))
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    pointers = (t.data_ptr() for t in (x, weight, out))
    loaded().rms_norm(*x.shape, eps, *pointers, threads())
    return out


def rms_norm_grad(
    grad: Float[Tensor, "runs rows dim"],
    x: Float[Tensor, "runs rows dim"],
    weight: Float[Tensor, "runs dim"],
    eps: float,
) -> tuple[Float[Tensor, "runs rows dim"], Float[Tensor, "runs dim"]]:
    """Gradients of `rms_norm` in x and weight."""
    check("rms_norm_grad", grad=(grad, x.shape, F32), x=(x, x.shape, F32))
    check("rms_norm_grad", weight=(weight, (x.shape[0], x.shape[2]), F32))
    inputs = [t.contiguous() for t in (x, weight, grad)]
    parts = max(1, min(PARTS, x.shape[1] // PARTS))
    grad_x, partial = torch.empty_like(inputs[0]), x.new_empty(x.shape[0], parts, x.shape[2])
    pointers = (t.data_ptr() for t in (*inputs, grad_x, partial))
    loaded().rms_norm_grad(*x.shape, parts, eps, *pointers, threads())
    return grad_x, partial[:, 0]


def split_heads(
    qkv: Float[Tensor, "runs batch seq all_heads dim"],
    norms: Float[Tensor, "runs normed dim"],
    cosines: Float[Tensor, "seq dim"],
    sines: Float[Tensor, "seq dim"],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into q (runs, batch, heads, seq, dim), k and v; apply RMSNorm and RoPE to q and k."""
    groups = _check_heads("split_heads", qkv, norms, cosines, sines)
    inputs = [t.contiguous() for t in (qkv, norms, cosines, sines)]
    runs, batch, seq, width, dim = qkv.shape
    outputs = [qkv.new_empty(runs, batch, count, seq, dim) for count in (width - 2 * groups, groups, groups)]
    pointers = (t.data_ptr() for t in (*inputs, *outputs))
    sizes = runs, batch, seq, width - 2 * groups, groups, dim
    loaded().split_heads(*sizes, eps, *pointers, threads())
    return outputs[0], outputs[1], outputs[2]


def _check_heads(kernel: str, qkv: Tensor, norms: Tensor, cosines: Tensor, sines: Tensor) -> int:
    """The number of key heads, which is that of value heads."""
    (runs, _, seq, width, dim), normed = qkv.shape, norms.shape[1]
    read = {"qkv": (qkv, qkv.shape, F32), "norms": (norms, (runs, normed, dim), F32)}
    check(kernel, **read, cosines=(cosines, (seq, dim), F32), sines=(sines, (seq, dim), F32))
    if dim % 2 or not width <= 2 * normed <= 2 * width:
        raise ValueError(f"{kernel}: expected {width // 2} to {width} norms and an even dim, got {normed} and {dim}")
    return width - normed


def split_heads_grad(
    grads: Sequence[Float[Tensor, "runs batch _ seq dim"]],
    qkv: Float[Tensor, "runs batch seq all_heads dim"],
    norms: Float[Tensor, "runs normed dim"],
    cosines: Float[Tensor, "seq dim"],
    sines: Float[Tensor, "seq dim"],
    eps: float,
) -> tuple[Float[Tensor, "runs batch seq all_heads dim"], Float[Tensor, "runs normed dim"]]:
    """Gradients of `split_heads` in qkv and norms."""
    groups = _check_heads("split_heads_grad", qkv, norms, cosines, sines)
    runs, batch, seq, width, dim = qkv.shape
    for name, grad, count in zip("qkv", grads, (width - 2 * groups, groups, groups), strict=True):
        check("split_heads_grad", **{f"grad of {name}": (grad, (runs, batch, count, seq, dim), F32)})
    inputs = [t.contiguous() for t in (qkv, norms, cosines, sines, *grads)]
    grad_qkv, grad_norms = torch.empty_like(inputs[0]), qkv.new_empty(runs, batch, width - groups, dim)
    room = qkv.new_empty(runs, batch, dim)
    pointers = (t.data_ptr() for t in (*inputs, grad_qkv, grad_norms, room))
    sizes = runs, batch, seq, width - 2 * groups, groups, dim
    loaded().split_heads_grad(*sizes, eps, *pointers, threads())
    return grad_qkv, grad_norms.sum(dim=1)


def attention(
    q: Float[Tensor, "batch groups share seq dim"],
    k: Float[Tensor, "batch groups seq dim"],
    v: Float[Tensor, "batch groups seq dim"],
    bias: Float[Tensor, "masks seq seq"],
) -> tuple[Float[Tensor, "batch seq groups share dim"], Float[Tensor, "batch groups share seq"]]:
    """Causal softmax(q k^T + bias) v and the log of each softmax's sum; fewer masks than batches are used again.

    Where the bias is float32's minimum the share is exactly 0, however low the other scores are, and whatever this one
    is; a query without any key gets zeros, and the log of its sum is -inf. A value that a query does not see may be no
    number.
    """
    _check_attention("attention", q, k, v, bias)
    inputs = [t.contiguous() for t in (q, k, v, bias)]
    batch, groups, share, seq, dim = q.shape
    out, log_sums = q.new_empty(batch, seq, groups, share, dim), q.new_empty(q.shape[:-1])
    pointers = [t.data_ptr() for t in inputs]
    rest = (out.data_ptr(), log_sums.data_ptr(), threads())
    if code := loaded().attention(*q.shape, *pointers, bias.shape[0], *rest):
        refuse("attention", code, memory=SCORES)
    return out, log_sums


def _check_attention(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    batch, groups, _, seq, dim = q.shape
    keys, masks = (batch, groups, seq, dim), max(bias.shape[0], 1)  # C divides by the number of masks
    read = {"q": (q, q.shape, F32), "k": (k, keys, F32), "v": (v, keys, F32), "bias": (bias, (masks, seq, seq), F32)}
    check(kernel, **read)


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
    batch, groups, share, seq, dim = q.shape
    _check_attention("attention_grad", q, k, v, bias)
    shape = batch, seq, groups, share, dim
    known_sums = {"log_sums": (log_sums, (batch, groups, share, seq), F32)}
    check("attention_grad", out=(out, shape, F32), grad=(grad, shape, F32), **known_sums)
    inputs = [t.contiguous() for t in (q, k, v, bias)]
    known = [t.contiguous() for t in (out, log_sums, grad)]
    grads = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    pointers, more = [t.data_ptr() for t in inputs], [t.data_ptr() for t in (*known, *grads)]
    if code := loaded().attention_grad(*q.shape, *pointers, bias.shape[0], *more, threads()):
        refuse("attention_grad", code, memory=SCORES)
    return grads


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

    Experts come in the order of (score = softmax + bias, then logit, then the lower number), each the larger first;
    what is no number counts as -inf there, and makes every kept weight of its token no number.

    Args:
        least: experts that are kept in any case, where `dynamic` keeps those that the budget leaves.
    """
    runs, tokens, experts = logits.shape
    read = {"logits": (logits, (runs, tokens, experts), F32), "bias": (bias, (runs, experts), F32)}
    check("choose", **read, budgets=(budgets, (runs,), F64), real=(real, (runs, tokens), BOOL))
    if not 0 <= slots <= experts:
        raise ValueError(f"choose: expected slots in [0, {experts}], got {slots}")
    inputs = [t.contiguous() for t in (logits, bias, budgets, real)]
    weights = logits.new_empty(runs, tokens, slots)
    outputs = weights, torch.empty_like(weights, dtype=torch.int64), torch.empty_like(weights, dtype=torch.bool)
    pointers = (t.data_ptr() for t in (*inputs, *outputs))
    if code := loaded().choose(runs, tokens, experts, slots, least, dynamic, *pointers, threads()):
        refuse("choose", code, memory="one token's experts, got none; use fewer experts")
    return outputs
