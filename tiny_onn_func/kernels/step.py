"""Kernels of the hyper step: surprise, targets, losses, counts and AdamW; functions of float32 CPU tensors."""

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from tiny_onn_func.kernels.runtime import loaded


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Int[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """-log softmax at the label and the softmax's entropy, both 0 where the label is negative; the first of the largest
    logits; the logarithm of the softmax's sum."""
    logits, labels = logits.contiguous(), labels.contiguous()
    made = [torch.empty_like(labels, dtype=dtype) for dtype in (logits.dtype, logits.dtype, labels.dtype, logits.dtype)]
    pointers = (t.data_ptr() for t in (logits, labels, *made))
    loaded().cross_entropy(labels.numel(), logits.shape[-1], *pointers, torch.get_num_threads())
    return made[0], made[1], made[2], made[3]


def cross_entropy_grad(
    grads: Float[Tensor, "*rows"],
    logits: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"],
    log_sums: Float[Tensor, "*rows"],
) -> Float[Tensor, "*rows vocab"]:
    """Gradients of the losses of `cross_entropy` in the logits."""
    given = [t.contiguous() for t in (grads, logits, labels, log_sums)]
    out = torch.empty_like(given[1])
    pointers = (t.data_ptr() for t in (*given, out))
    loaded().cross_entropy_grad(labels.numel(), logits.shape[-1], *pointers, torch.get_num_threads())
    return out


def adamw(
    numbers: Sequence[Float[Tensor, "runs 6"]],
    params: Sequence[Float[Tensor, "runs _"]],
    grads: Sequence[Float[Tensor, "runs _"]],
    mu: Sequence[Float[Tensor, "runs _"]],
    nu: Sequence[Float[Tensor, "runs _"]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """New parameters and moments of every leaf, each read and written once.

    Args:
        numbers: of each leaf and run, what gradients are multiplied with, 1 - beta1, 1 - beta2, eps, decay and step.
    """
    given = [[t.contiguous() for t in leaves] for leaves in (numbers, params, grads, mu, nu)]
    made = [[torch.empty_like(t) for t in given[1]] for _ in range(3)]
    count, tiny = len(params), torch.finfo(params[0].dtype).tiny
    counts = (ctypes.c_int64 * count)(*(t.shape[1] for t in params))
    read, *rest = ((ctypes.c_void_p * count)(*(t.data_ptr() for t in leaves)) for leaves in (*given, *made))
    loaded().adamw(count, params[0].shape[0], counts, read, tiny, *rest, torch.get_num_threads())
    return made[0], made[1], made[2]


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
