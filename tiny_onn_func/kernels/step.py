"""Kernels of the hyper step: surprise, targets, losses, counts and AdamW; functions of float32 CPU tensors."""

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from tiny_onn_func.kernels.runtime import Read, check, loaded, refuse, threads

IGNORE_INDEX = -100  # the label of a position that has no target, as in torch.nn.functional.cross_entropy
TIE_TOLERANCE = 2.0**-17  # of the larger size: values of a token's experts that lie no further apart are equal
F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"], Int[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Cross entropy of each row, its softmax's entropy, the most probable token, and a log-sum, in one pass.

    Returns:
        -log softmax at the label and the entropy, both 0 where the label is -100; the first of the largest logits, or
        of those that are NaN; the logarithm of the sum of e^(logit - the largest).

    Raises:
        IndexError: a label is neither in the vocabulary nor -100.
    """
    shape, vocab = labels.shape, logits.shape[-1]
    check("cross_entropy", logits=(logits, (*shape, vocab), F32), labels=(labels, shape, I64))
    logits, labels = logits.contiguous(), labels.contiguous()
    outputs = [torch.empty_like(labels, dtype=dtype) for dtype in (F32, F32, I64, F32)]
    pointers = (t.data_ptr() for t in (logits, labels, *outputs))
    sizes = labels.numel(), vocab, IGNORE_INDEX
    if code := loaded().cross_entropy(*sizes, *pointers, threads()):
        refuse("cross_entropy", code, _labels(vocab))
    return outputs[0], outputs[1], outputs[2], outputs[3]


def _labels(vocab: int) -> str:
    return f"labels in [0, {vocab}) or {IGNORE_INDEX}"


def cross_entropy_grad(
    grads: Float[Tensor, "*rows"],
    logits: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"],
    best: Int[Tensor, "*rows"],
    log_sums: Float[Tensor, "*rows"],
) -> Float[Tensor, "*rows vocab"]:
    """Gradients of the losses of `cross_entropy` in the logits; `best` and `log_sums` are its last two outputs."""
    shape, vocab = labels.shape, logits.shape[-1]
    read = {"grads": (grads, shape, F32), "logits": (logits, (*shape, vocab), F32)}
    more = {"best": (best, shape, I64), "log_sums": (log_sums, shape, F32)}
    check("cross_entropy_grad", **read, labels=(labels, shape, I64), **more)
    inputs = [t.contiguous() for t in (grads, logits, labels, best, log_sums)]
    out = torch.empty_like(inputs[1])
    pointers = (t.data_ptr() for t in (*inputs, out))
    sizes = labels.numel(), vocab, IGNORE_INDEX
    if code := loaded().cross_entropy_grad(*sizes, *pointers, threads()):
        refuse("cross_entropy_grad", code, f"{_labels(vocab)}, and best in [0, {vocab}) beside a label")
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
    runs = params[0].shape[0]
    for n, p, g, m, v in zip(numbers, params, grads, mu, nu, strict=True):
        shape = runs, p.shape[1]
        check("adamw", numbers=(n, (runs, 6), F32), params=(p, shape, F32), grads=(g, shape, F32))
        check("adamw", mu=(m, shape, F32), nu=(v, shape, F32))
    inputs = [[t.contiguous() for t in leaves] for leaves in (numbers, params, grads, mu, nu)]
    outputs = [[torch.empty_like(t) for t in inputs[1]] for _ in range(3)]
    count, tiny = len(params), torch.finfo(F32).tiny
    counts = (ctypes.c_int64 * count)(*(t.shape[1] for t in params))
    read, *rest = ((ctypes.c_void_p * count)(*(t.data_ptr() for t in leaves)) for leaves in (*inputs, *outputs))
    loaded().adamw(count, runs, counts, read, tiny, *rest, threads())
    return outputs[0], outputs[1], outputs[2]


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

    Inactive rows have expert `experts`.
    """
    (runs, rows, in_dim), out_dim = left.shape, right.shape[-1]
    out_dim = in_dim if is_signed else out_dim
    read = {"left": (left, (runs, rows, in_dim), F32), "right": (right, (runs, rows, out_dim), F32)}
    check("spread_surprise", **read, token=(token, (runs, rows), I64), expert=(expert, (runs, rows), I64))
    inputs = [t.contiguous() for t in (left, right, token, expert)]
    surface = left.new_empty(runs, tokens, experts)
    pointers = (t.data_ptr() for t in (*inputs, surface))
    sizes = runs, rows, in_dim, out_dim, tokens, experts
    if code := loaded().spread_surprise(*sizes, is_signed, *pointers, threads()):
        refuse("spread_surprise", code, f"token in [0, {tokens}) and expert in [0, {experts}]")
    return surface


def least_surprised(
    surprise: Float[Tensor, "runs layers tokens experts"],
    real: Bool[Tensor, "runs tokens"],
    least: Float[Tensor, " runs"],
    sign: Float[Tensor, " runs"],
) -> tuple[Int64[Tensor, "runs layers tokens"], Bool[Tensor, "runs layers tokens"], Bool[Tensor, "runs layers tokens"]]:
    """(expert, informative, tied): the expert of the least finite sign * surprise, and the tokens with a target.

    v = sign * (0 where |surprise| < the smallest normal number, else surprise), where the surprise is finite;
    expert = the first of the least v; a token of several candidates is tied iff
    max v - min v <= TIE_TOLERANCE * max(|max v|, |min v|).

    Args:
        least: candidates that a token must have to teach.
    """
    runs, layers, tokens, experts = surprise.shape
    read = {"surprise": (surprise, (runs, layers, tokens, experts), F32), "real": (real, (runs, tokens), BOOL)}
    check("least_surprised", **read, least=(least, (runs,), F32), sign=(sign, (runs,), F32))
    inputs = [t.contiguous() for t in (surprise, real, least, sign)]
    outputs = [torch.empty(surprise.shape[:-1], dtype=dtype) for dtype in (I64, BOOL, BOOL)]
    pointers = (t.data_ptr() for t in (*inputs, *outputs))
    loaded().least_surprised(*surprise.shape, TIE_TOLERANCE, *pointers, threads())
    return outputs[0], outputs[1], outputs[2]


def router_sums(
    logits: Float[Tensor, "runs layers tokens experts"],
    target: Int64[Tensor, "runs layers tokens"],
    informative: Bool[Tensor, "runs layers tokens"],
    real: Bool[Tensor, "runs tokens"],
) -> tuple[Float[Tensor, "runs layers"], Float[Tensor, "runs layers experts"], Float[Tensor, "runs layers"]]:
    """-log softmax at the target, the softmax, and the squared log of its sum, added up over each layer's tokens."""
    runs, layers, _, experts = logits.shape
    check("router_sums", **_taught(logits, target, informative, real))
    inputs = [t.contiguous() for t in (logits, target, informative, real)]
    sums = logits.new_empty(runs, layers), logits.new_empty(runs, layers, experts), logits.new_empty(runs, layers)
    pointers = (t.data_ptr() for t in (*inputs, *sums))
    if code := loaded().router_sums(*logits.shape, *pointers, threads()):
        refuse("router_sums", code, _targets(experts), "one token's experts, got none; use fewer experts")
    return sums


def _taught(logits: Tensor, target: Tensor, informative: Tensor, real: Tensor) -> dict[str, Read]:
    """Inputs of the router-loss kernels as `check` reads them: name -> (tensor, shape, dtype)."""
    runs, layers, tokens, experts = logits.shape
    by_token = runs, layers, tokens
    return {
        "logits": (logits, (*by_token, experts), F32),
        "target": (target, by_token, I64),
        "informative": (informative, by_token, BOOL),
        "real": (real, (runs, tokens), BOOL),
    }


def _targets(experts: int) -> str:
    return f"target in [0, {experts}) where informative"


def router_sums_grad(
    grads: tuple[Tensor, Tensor, Tensor],
    logits: Float[Tensor, "runs layers tokens experts"],
    target: Int64[Tensor, "runs layers tokens"],
    informative: Bool[Tensor, "runs layers tokens"],
    real: Bool[Tensor, "runs tokens"],
) -> Float[Tensor, "runs layers tokens experts"]:
    """Gradient of `router_sums` in the logits."""
    runs, layers, _, experts = logits.shape
    picked, mass, squares = grads
    slopes = {"picked": (picked, (runs, layers), F32), "mass": (mass, (runs, layers, experts), F32)}
    read = _taught(logits, target, informative, real)
    check("router_sums_grad", **read, **slopes, squares=(squares, (runs, layers), F32))
    inputs = [t.contiguous() for t in (logits, target, informative, real, *grads)]
    out = torch.empty_like(inputs[0])
    pointers = (t.data_ptr() for t in (*inputs, out))
    if code := loaded().router_sums_grad(*logits.shape, *pointers, threads()):
        refuse("router_sums_grad", code, _targets(experts))
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
    """Count routing per layer and per expert, in one pass over tokens.

    Returns:
        counts of informative tokens, hits, ties and visits (4, runs, layers); chance (runs, layers); and for each
        expert (runs, layers, experts) rows, targets, the sum of finite surprise, and the number of finite entries.
    """
    (runs, layers, tokens, experts), slots = logits.shape, expert_ids.shape[-1]
    by_slot = runs, layers, tokens, slots
    routed = {"expert_ids": (expert_ids, by_slot, I64), "active": (active, by_slot, BOOL)}
    read = {"surprise": (surprise, logits.shape, F32), "tied": (tied, (runs, layers, tokens), BOOL)}
    check("routing_sums", **_taught(logits, target, informative, real), **routed, **read)
    inputs = [t.contiguous() for t in (logits, surprise, expert_ids, active, target, informative, tied, real)]
    counts, chance = expert_ids.new_empty(4, runs, layers), logits.new_empty(runs, layers)
    by_expert = [torch.empty(runs, layers, experts, dtype=dtype) for dtype in (I64, I64, F64, I64)]
    pointers = (t.data_ptr() for t in (*inputs, counts, chance, *by_expert))
    sizes = runs, layers, tokens, experts, slots
    if code := loaded().routing_sums(*sizes, *pointers, threads()):
        refuse("routing_sums", code, f"expert_ids in [0, {experts}) where active, and {_targets(experts)}")
    return counts, chance, *by_expert
