"""What is told twice, plainly and as a kernel: both ways agree, under every transform, whatever the threads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.helpers import assert_close, seeded
from tiny_onn_func.attention import ATTEND, SPLIT_HEADS, causal_bias, split_heads
from tiny_onn_func.kernels import build, runtime
from tiny_onn_func.ops import RMS_NORM, SWIGLU, rotary_angles
from tiny_onn_func.primitives.fused import FusedOp, autograd_function
from training.step.losses import CROSS_ENTROPY
from training.step.router_loss import ROUTER_SUMS

NATIVE = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")


Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    op: FusedOp
    draw: Callable[..., tuple[Any, ...]]  # (seed, size, width) -> float64 inputs


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def some_heads(seed: int, size: int, width: int) -> tuple[Any, ...]:
    dim = 2 * width
    angles = (t.double()[None] for t in rotary_angles(torch.arange(size), dim, 100.0))
    return drawn(2, size, 5, dim, seed=seed), drawn(4, dim, seed=seed + 1), *angles, 1e-3


def some_attention(seed: int, size: int, width: int) -> tuple[Any, ...]:
    real = (torch.arange(size) < torch.tensor([[size], [max(1, size // 2)]])).long()
    q, k, v = drawn(2, 1, 2, size, width, seed=seed), *(drawn(2, 1, size, width, seed=seed + i) for i in (1, 2))
    return q, k, v, causal_bias(real, size, torch.device("cpu"), torch.float64).clamp_min(-1e6)


def some_logits(seed: int, size: int, width: int) -> tuple[Any, ...]:
    labels = torch.randint(-1, width, (2, size), generator=seeded(seed))
    return 3 * drawn(2, size, width, seed=seed), torch.where(labels < 0, -100, labels)


def some_targets(seed: int, size: int, width: int) -> tuple[Any, ...]:
    target = torch.randint(width, (3, size), generator=seeded(seed))
    informative, real = drawn(3, size, seed=seed + 1) > 0, (torch.arange(size) + seed) % 5 != 4
    return 3 * drawn(3, size, width, seed=seed), target, informative, real


CASES = {
    "rms_norm": Case(
        RMS_NORM, lambda seed, size, width: (drawn(2, size, width, seed=seed), drawn(width, seed=seed + 9), 1e-3)
    ),
    "split_heads": Case(SPLIT_HEADS, some_heads),
    "attend": Case(ATTEND, some_attention),
    "activate": Case(SWIGLU, lambda seed, size, dim: (drawn(size, dim, seed=seed), drawn(size, dim, seed=seed + 9))),
    "cross_entropy": Case(CROSS_ENTROPY, some_logits),
    "router_sums": Case(ROUTER_SUMS, some_targets),
}
EVERY = pytest.mark.parametrize("name", CASES)


def single(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)


def smooth_part(op: FusedOp, way: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
    rest = inputs[op.floats :]
    return lambda *own: tuple(way(*own, *rest)[: op.smooth])


def slopes(
    op: FusedOp, way: Callable[..., Any], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(all outputs, gradients of the smooth ones times drawn numbers)."""
    own = [t.detach().requires_grad_() for t in inputs[: op.floats]]
    out = way(*own, *inputs[op.floats :])
    total = sum((t * drawn(*t.shape, seed=7).to(t.dtype)).sum() for t in out[: op.smooth])
    return tuple(t.detach() for t in out), torch.autograd.grad(total, own)


@NATIVE
@EVERY
@example(seed=0, size=1, width=1)
@example(seed=0, size=70, width=33)
@given(seed=st.integers(0, 99), size=st.integers(1, 70), width=st.sampled_from([1, 3, 8, 15, 16, 17, 31, 33, 64, 257]))
def test_the_kernel_equals_the_plain_way_with_its_gradients(name: str, seed: int, size: int, width: int) -> None:
    op, draw = CASES[name]
    width = min(width, 40) if name != "cross_entropy" else width
    inputs = draw(seed, size, width)
    assert runtime.usable_now(*single(inputs)[: op.floats])
    actual, actual_slopes = slopes(op, autograd_function(op).apply, single(inputs))
    wanted, wanted_slopes = slopes(op, op.reference, inputs)
    for ours, theirs in zip((*actual, *actual_slopes), (*wanted, *wanted_slopes), strict=True):
        if theirs.is_floating_point():
            size_of = max(1.0, float(theirs.abs().max()))
            assert float((ours.double() - theirs).abs().max()) <= 2e-5 * size_of
        else:
            assert torch.equal(ours, theirs)


@EVERY
def test_gradcheck_gradgradcheck_and_forward_mode(name: str) -> None:
    op, draw = CASES[name]
    inputs = draw(0, 3, 2)
    own = [t.requires_grad_() for t in inputs[: op.floats]]
    function = smooth_part(op, autograd_function(op).apply, inputs)
    assert torch.autograd.gradcheck(function, own, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, own)


@NATIVE
@EVERY
def test_a_second_derivative_through_the_kernel_is_the_plain_ones(name: str) -> None:
    op, draw = CASES[name]
    inputs = draw(0, 5, 4)

    def curvature(way: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        own = [t.detach().requires_grad_() for t in inputs[: op.floats]]
        value = sum((t**2).sum() for t in smooth_part(op, way, inputs)(*own))
        first = torch.autograd.grad(value, own, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), own)

    for ours, theirs in zip(curvature(op, single(inputs)), curvature(op.reference, inputs), strict=True):
        assert_close(ours.double(), theirs, 1e-4 * max(1.0, float(theirs.abs().max())))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [None, 0, 1])
def test_mapped_runs_equal_a_loop_forward_and_in_a_gradient(name: str, dtype: torch.dtype, shared: int | None) -> None:
    op, draw = CASES[name]
    drawings = [draw(seed, 5, 4) for seed in range(6)]
    if dtype == torch.float32:
        drawings = [single(inputs) for inputs in drawings]
    count = sum(isinstance(t, Tensor) for t in drawings[0])
    shared = None if shared is None or op.floats == 1 else shared
    dims = tuple(None if place == shared else 0 for place in range(count))
    columns = [torch.stack(list(t)) for t in zip(*(inputs[:count] for inputs in drawings), strict=True)]
    args = [t if dim == 0 else t[0] for t, dim in zip(columns, dims, strict=True)]
    numbers = drawings[0][count:]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for way in (op, autograd_function(op).apply):

        def outputs(*tensors: Tensor, way: Callable[..., Any] = way) -> tuple[Tensor, ...]:
            return tuple(way(*tensors, *numbers))

        def slope(*tensors: Tensor, way: Callable[..., Any] = way) -> Tensor:
            value = lambda first: sum((t**2).sum() for t in way(first, *tensors[1:], *numbers)[: op.smooth])  # noqa: E731
            return grad(value)(tensors[0])

        for function in (outputs, lambda *tensors: (slope(*tensors),)):
            loop = [
                function(*(t[run] if dim == 0 else t for t, dim in zip(args, dims, strict=True))) for run in range(6)
            ]
            mapped = vmap(function, dims)(*args)
            halves = [t.unflatten(0, (2, 3)) if dim == 0 else t for t, dim in zip(args, dims, strict=True)]
            nested = vmap(vmap(function, dims), dims)(*halves)
            for place, wanted in enumerate(zip(*loop, strict=True)):
                assert_close(mapped[place], torch.stack(list(wanted)), tolerance)
                assert_close(nested[place].flatten(0, 1), torch.stack(list(wanted)), tolerance)


@EVERY
def test_forward_mode_of_mapped_runs_equals_a_loop(name: str) -> None:
    op, draw = CASES[name]
    drawings = [single(draw(seed, 4, 3)) for seed in range(3)]
    count = sum(isinstance(t, Tensor) for t in drawings[0])
    columns = [torch.stack(list(t)) for t in zip(*(inputs[:count] for inputs in drawings), strict=True)]

    def tangent(*tensors: Tensor) -> tuple[Tensor, ...]:
        function = smooth_part(op, op, (*tensors, *drawings[0][count:]))
        own = tensors[: op.floats]
        return jvp(function, own, tuple(torch.ones_like(t) for t in own))[1]

    loop = [tangent(*(t[run] for t in columns)) for run in range(3)]
    for actual, wanted in zip(vmap(tangent)(*columns), zip(*loop, strict=True), strict=True):
        assert_close(actual, torch.stack(list(wanted)), 2e-5)


@NATIVE
@EVERY
def test_the_bits_depend_on_no_thread_and_no_other_run(name: str) -> None:
    op, draw = CASES[name]
    drawings = [single(draw(seed, 40, 24)) for seed in range(3)]
    count = sum(isinstance(t, Tensor) for t in drawings[0])
    columns = [torch.stack(list(t)) for t in zip(*(inputs[:count] for inputs in drawings), strict=True)]
    numbers = drawings[0][count:]
    together = slopes(op, autograd_function(op).apply, (*columns, *numbers))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = slopes(op, autograd_function(op).apply, (*columns, *numbers))
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip((*together[0], *together[1]), (*shared[0], *shared[1]), strict=True):
        assert torch.equal(ours, theirs)
    alone = autograd_function(op).apply(*drawings[1])
    assert all(torch.equal(of_run, of_runs[1]) for of_run, of_runs in zip(alone, together[0], strict=True))

    def pulled_back(inputs: tuple[Any, ...], upstream: list[Tensor]) -> Tensors:
        own = [t.detach().requires_grad_() for t in inputs[: op.floats]]
        out = autograd_function(op).apply(*own, *inputs[op.floats :])[: op.smooth]
        return torch.autograd.grad(out, own, upstream)

    upstream = [drawn(*t.shape, seed=8).float() for t in together[0][: op.smooth]]
    of_all = pulled_back((*columns, *numbers), upstream)
    for run in range(3):
        of_one = pulled_back(drawings[run], [t[run] for t in upstream])
        assert all(torch.equal(of_run, of_runs[run]) for of_run, of_runs in zip(of_one, of_all, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_positions_of_each_row_its_own_turn_each_row_alone(dtype: torch.dtype) -> None:
    qkv, norms = drawn(3, 4, 5, 6).to(dtype), drawn(4, 6, seed=1).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1], [9, 9, 9, 0]])
    cosines, sines = (t.to(dtype) for t in rotary_angles(positions, 6, 100.0))
    heads = split_heads(qkv, norms, (cosines, sines), 1e-3)
    for row in range(3):
        alone = split_heads(qkv[row : row + 1], norms, (cosines[row], sines[row]), 1e-3)
        for of_rows, of_row in zip(heads, alone, strict=True):
            assert_close(of_rows[row : row + 1], of_row, 1e-6)


@NATIVE
@EVERY
def test_what_is_not_a_number_stays_so(name: str) -> None:
    op, draw = CASES[name]
    inputs = single(draw(0, 6, 5))
    inputs[0].view(-1)[0] = torch.nan
    out, grads = slopes(op, autograd_function(op).apply, inputs)
    assert any(t.isnan().any() for t in out[: op.smooth])
    assert grads[0].isnan().any()


@NATIVE
@EVERY
def test_tensors_that_lie_otherwise_are_read_right(name: str) -> None:
    op, draw = CASES[name]
    inputs = single(draw(0, 6, 5))
    scattered = tuple(
        torch.stack((t, t), dim=-1).flatten(-2)[..., ::2] if isinstance(t, Tensor) and t.ndim else t for t in inputs
    )
    for ours, theirs in zip(autograd_function(op).apply(*scattered), autograd_function(op).apply(*inputs), strict=True):
        assert torch.equal(ours, theirs)
