"""The compiled kernels of what the router decides and learns from, as functions of plain tensors; see kernels.py."""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tiny_onn_func.signatures import loaded


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


def spread_surprise(
    left: Float[Tensor, "runs rows in_dim"],
    right: Float[Tensor, "runs rows out_dim"],
    token: Int64[Tensor, "runs rows"],
    expert: Int64[Tensor, "runs rows"],
    tokens: int,
    experts: int,
    *,
    is_signed: bool,
) -> Float[Tensor, "runs tokens experts"]:
    """||left|| * ||right|| of every row, or <left, right>, at [token, expert]; +inf elsewhere.

    Rows of nobody have expert `experts`.
    """
    given = [t.contiguous() for t in (left, right, token, expert)]
    runs, rows, in_dim = left.shape
    surface = left.new_empty(runs, tokens, experts)
    pointers = (t.data_ptr() for t in (*given, surface))
    sizes = runs, rows, in_dim, right.shape[2], tokens, experts
    loaded().spread_surprise(*sizes, is_signed, *pointers, torch.get_num_threads())
    return surface


def least_surprised(
    surprise: Float[Tensor, "runs layers tokens experts"],
    real: Bool[Tensor, "runs tokens"],
    least: Float[Tensor, " runs"],
    sign: Float[Tensor, " runs"],
) -> tuple[Int64[Tensor, "runs layers tokens"], Bool[Tensor, "runs layers tokens"], Bool[Tensor, "runs layers tokens"]]:
    """(expert, informative, tied): the expert of the least finite sign * surprise, and who teaches.

    Args:
        least: candidates that a token must have to teach.
    """
    given = [t.contiguous() for t in (surprise, real, least, sign)]
    made = [torch.empty(surprise.shape[:-1], dtype=dtype) for dtype in (torch.int64, torch.bool, torch.bool)]
    pointers = (t.data_ptr() for t in (*given, *made))
    loaded().least_surprised(*surprise.shape, *pointers, torch.get_num_threads())
    return made[0], made[1], made[2]


def router_sums(
    logits: Float[Tensor, "runs layers tokens experts"],
    target: Int64[Tensor, "runs layers tokens"],
    informative: Bool[Tensor, "runs layers tokens"],
    real: Bool[Tensor, "runs tokens"],
) -> tuple[Float[Tensor, "runs layers"], Float[Tensor, "runs layers experts"], Float[Tensor, "runs layers"]]:
    """-log softmax at the target, the softmax, and the squared log of its sum, added up over each layer's tokens."""
    given = [t.contiguous() for t in (logits, target, informative, real)]
    runs, layers, _, experts = logits.shape
    made = logits.new_empty(runs, layers), logits.new_empty(runs, layers, experts), logits.new_empty(runs, layers)
    pointers = (t.data_ptr() for t in (*given, *made))
    if loaded().router_sums(*logits.shape, *pointers, torch.get_num_threads()):
        raise MemoryError("router_sums: expected memory for one token's experts, got none; use fewer experts")
    return made


def router_sums_grad(
    grads: tuple[Tensor, Tensor, Tensor],
    logits: Float[Tensor, "runs layers tokens experts"],
    target: Int64[Tensor, "runs layers tokens"],
    informative: Bool[Tensor, "runs layers tokens"],
    real: Bool[Tensor, "runs tokens"],
) -> Float[Tensor, "runs layers tokens experts"]:
    """Gradient of `router_sums` in the logits."""
    given = [t.contiguous() for t in (logits, target, informative, real, *grads)]
    out = torch.empty_like(given[0])
    pointers = (t.data_ptr() for t in (*given, out))
    loaded().router_sums_grad(*logits.shape, *pointers, torch.get_num_threads())
    return out


def routing_sums(
    logits: Float[Tensor, "runs layers tokens experts"],
    surprise: Float[Tensor, "runs layers tokens experts"],
    expert_ids: Int64[Tensor, "runs layers tokens slots"],
    active: Bool[Tensor, "runs layers tokens slots"],
    target: Int64[Tensor, "runs layers tokens"],
    informative: Bool[Tensor, "runs layers tokens"],
    tied: Bool[Tensor, "runs layers tokens"],
    real: Bool[Tensor, "runs tokens"],
) -> tuple[Tensor, ...]:
    """Numbers of (informative, hits, tied, visits) (4, runs, layers), chance (runs, layers), and by expert
    (runs, layers, experts): rows, targets, sums of finite surprise, and how many those are."""
    given = [t.contiguous() for t in (logits, surprise, expert_ids, active, target, informative, tied, real)]
    runs, layers, tokens, experts = logits.shape
    counts, chance = expert_ids.new_empty(4, runs, layers), logits.new_empty(runs, layers)
    dtypes = torch.int64, torch.int64, torch.float64, torch.int64
    made = [torch.empty(runs, layers, experts, dtype=dtype) for dtype in dtypes]
    pointers = (t.data_ptr() for t in (*given, counts, chance, *made))
    sizes = runs, layers, tokens, experts, expert_ids.shape[-1]
    loaded().routing_sums(*sizes, *pointers, torch.get_num_threads())
    return counts, chance, *made
