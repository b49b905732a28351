"""Grouped matmul, outer, dispatch and combine: against loops over single rows, in every transform."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from tests.helpers import assert_close, seeded
from tiny_onn_func.kernels import runtime
from tiny_onn_func.ops import SWIGLU
from tiny_onn_func.primitives import grouped
from tiny_onn_func.primitives.dispatch import combine_rows, dispatch_rows
from tiny_onn_func.primitives.fused import autograd_function
from tiny_onn_func.primitives.gate_up import gate_and_up
from tiny_onn_func.primitives.grouped import GroupedSum, dense_matmul, grouped_matmul, grouped_outer
from tiny_onn_func.primitives.vmap import flatten_runs

ACTIVATED = autograd_function(SWIGLU)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}
# torch itself warns once, when forward mode is used for the first time in a process
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Sizes(NamedTuple):
    """Rows of each expert, rows that belong to nobody, and two widths."""

    counts: tuple[int, ...]
    nobody: int
    width: int
    out: int

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.nobody

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(list(itertools.accumulate(self.counts)), dtype=torch.int32)


SIZES = st.builds(
    Sizes,
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    nobody=st.integers(0, 4),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
).filter(lambda sizes: sizes.rows > 0)
AWKWARD = (
    Sizes((7, 0, 0), 0, 3, 5),  # one expert takes all
    Sizes((0, 0, 0), 4, 8, 4),  # nobody is routed
    Sizes((0, 3, 0, 2), 3, 1, 1),
    Sizes((1,), 0, 4, 8),
    Sizes((5, 4), 2, 8, 16),  # aligned: the library's kernel
)


def awkward(test: Any) -> Any:
    for sizes in AWKWARD:
        test = example(sizes=sizes)(test)
    return test


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def expert_of_row(offsets: Tensor, rows: int) -> list[int]:
    """Expert of each row, or the number of experts behind the last offset; one row at a time."""
    ends = offsets.tolist()
    return [next((e for e, end in enumerate(ends) if row < end), len(ends)) for row in range(rows)]


def naive_matmul(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    experts = expert_of_row(offsets, rows.shape[0])
    nothing = rows.new_zeros(weights.shape[-1])
    return torch.stack([nothing if e == len(weights) else rows[n] @ weights[e] for n, e in enumerate(experts)])


def naive_outer(rows: Tensor, grads: Tensor, offsets: Tensor) -> Tensor:
    out = [rows.new_zeros(rows.shape[1], grads.shape[1]) for _ in offsets]
    for n, e in enumerate(expert_of_row(offsets, rows.shape[0])):
        if e < len(out):
            out[e] = out[e] + rows[n, :, None] * grads[n, None, :]
    return torch.stack(out)


def naive_dispatch(x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
    return torch.stack([x[flat // slots] for flat in order.tolist()])


def naive_combine(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    out = [y.new_zeros(y.shape[-1]) for _ in range(weights.shape[0])]
    for row, flat in enumerate(order.tolist()):
        token, slot = divmod(flat, weights.shape[1])
        out[token] = out[token] + weights[token, slot] * y[row]
    return torch.stack(out)


def in_turn(
    function: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, upstream: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(value, both gradients) in float64, and the same of the absolute values: the sizes of what is added up."""
    results = []
    for drawn in ((left, right, upstream), (left.abs(), right.abs(), upstream.abs())):
        *pair, pulled = (t.double() for t in drawn)
        out, back = vjp(function, *pair)
        results.append([out, *back(pulled)])
    return results[0], results[1]


def assert_sums_close(actual: Tensor, wanted: Tensor, sizes: Tensor, tolerance: float, what: str) -> None:
    """Relative to the sums of the terms' sizes: terms that cancel out leave a small sum whose error is not small."""
    error = (actual.double() - wanted).abs()
    assert bool((error <= tolerance * sizes).all()), f"{what}: {float((error / sizes.clamp_min(1e-300)).max()):.3e}"


# ---- one call each: against the loops ------------------------------------------------------------------------------


@DTYPES
@awkward
@given(sizes=SIZES)
def test_grouped_matmul_and_its_gradients_equal_a_loop_over_rows(sizes: Sizes, dtype: torch.dtype) -> None:
    rows = normal(sizes.rows, sizes.width, dtype=dtype)
    weights = normal(len(sizes.counts), sizes.width, sizes.out, seed=1, dtype=dtype)
    upstream = normal(sizes.rows, sizes.out, seed=2, dtype=dtype)
    out, back = vjp(lambda r, w: grouped_matmul(r, w, sizes.offsets), rows, weights)
    ought, of_sizes = in_turn(lambda r, w: naive_matmul(r, w, sizes.offsets), rows, weights, upstream)
    for actual, place, name in zip((out, *back(upstream)), range(3), ("out", "rows", "weights"), strict=True):
        assert actual.dtype == dtype
        assert_sums_close(actual, ought[place], of_sizes[place], TOLERANCE[dtype], name)
    assert not out[sum(sizes.counts) :].any()


@DTYPES
@awkward
@given(sizes=SIZES)
def test_grouped_outer_and_its_gradients_equal_a_loop_over_rows(sizes: Sizes, dtype: torch.dtype) -> None:
    rows, grads = normal(sizes.rows, sizes.width, dtype=dtype), normal(sizes.rows, sizes.out, seed=1, dtype=dtype)
    upstream = normal(len(sizes.counts), sizes.width, sizes.out, seed=2, dtype=dtype)
    out, back = vjp(lambda r, g: grouped_outer(r, g, sizes.offsets), rows, grads)
    ought, of_sizes = in_turn(lambda r, g: naive_outer(r, g, sizes.offsets), rows, grads, upstream)
    for actual, place, name in zip((out, *back(upstream)), range(3), ("out", "rows", "grads"), strict=True):
        assert actual.dtype == dtype
        assert_sums_close(actual, ought[place], of_sizes[place], TOLERANCE[dtype], name)


class Shuffle(NamedTuple):
    """A permutation of (token, slot) pairs."""

    tokens: int
    slots: int
    dim: int
    seed: int

    @property
    def order(self) -> Tensor:
        return torch.randperm(self.tokens * self.slots, generator=seeded(self.seed))

    @property
    def inverse(self) -> Tensor:
        return self.order.argsort()


SHUFFLES = st.builds(Shuffle, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))


@DTYPES
@given(SHUFFLES)
def test_dispatch_and_combine_and_their_gradients_equal_a_loop_over_rows(dtype: torch.dtype, case: Shuffle) -> None:
    tokens, slots, dim, _ = case
    order, inverse = case.order, case.inverse
    x, y = normal(tokens, dim, dtype=dtype), normal(tokens * slots, dim, seed=1, dtype=dtype)
    weights = normal(tokens, slots, seed=2, dtype=dtype)
    pairs = (
        (lambda x: dispatch_rows(x, order, inverse, slots), lambda x: naive_dispatch(x, order, inverse, slots), (x,)),
        (
            lambda y, w: combine_rows(y, w, order, inverse),
            lambda y, w: naive_combine(y, w, order, inverse),
            (y, weights),
        ),
    )
    for ours, naive, inputs in pairs:
        out, back = vjp(ours, *inputs)
        wanted, naive_back = vjp(naive, *(t.double() for t in inputs))
        assert_close(out, wanted, TOLERANCE[dtype], "out")
        upstream = normal(*out.shape, seed=3, dtype=dtype)
        for actual, ought in zip(back(upstream), naive_back(upstream.double()), strict=True):
            assert actual.dtype == dtype
            assert_close(actual, ought, TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
@DTYPES
def test_the_layout_in_memory_changes_no_value(layout: str, dtype: torch.dtype) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "expanded":
            return t[..., :1].expand(t.shape)
        if layout == "strided":
            return t.repeat_interleave(2, dim=-1)[..., ::2]
        return F.pad(t, (1, 3))[..., 1:-3]

    sizes = Sizes((5, 0, 4), 3, 8, 16)
    rows, weights = normal(sizes.rows, 8, dtype=dtype), normal(3, 8, 16, seed=1, dtype=dtype)
    grads = normal(sizes.rows, 16, seed=2, dtype=dtype)
    for a, b, function in ((rows, weights, grouped_matmul), (rows, grads, grouped_outer)):
        for left, right in ((laid_out(a), b), (a, laid_out(b)), (laid_out(a), laid_out(b))):
            wanted = function(left.double().contiguous(), right.double().contiguous(), sizes.offsets)
            assert_close(function(left, right, sizes.offsets), wanted, TOLERANCE[dtype], layout)


# ---- rows that belong to nobody ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["alone", "vmap"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e38], ids=str)
@pytest.mark.parametrize(("width", "out"), [(8, 16), (3, 5)], ids=["library kernel", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_garbage_in_rows_behind_the_last_offset_reaches_nothing(
    dtype: torch.dtype, width: int, out: int, garbage: float, transform: str
) -> None:
    sizes = Sizes((2, 0, 3), 4, width, out)
    nobody = torch.arange(sizes.rows) >= 5
    clean_rows, clean_grad = normal(sizes.rows, width, dtype=dtype), normal(sizes.rows, out, seed=1, dtype=dtype)
    weights, offsets = normal(3, width, out, seed=2, dtype=dtype), sizes.offsets
    rows, upstream = (t.masked_fill(nobody[:, None], garbage) for t in (clean_rows, clean_grad))

    def everything(rows: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        y, back = vjp(lambda r, w: grouped_matmul(r, w, offsets), rows, weights)
        outer, outer_back = vjp(lambda r, g: grouped_outer(r, g, offsets), rows, upstream)
        return y, *back(upstream), outer, *outer_back(weights)

    if transform == "vmap":
        dirty = tuple(
            t[1] for t in vmap(everything)(torch.stack((clean_rows, rows)), torch.stack((clean_grad, upstream)))
        )
    else:
        dirty = everything(rows, upstream)
    names = ("out", "gradient of rows", "gradient of weights", "outer", "outer: of rows", "outer: of grads")
    for ours, wanted, name in zip(dirty, everything(clean_rows, clean_grad), names, strict=True):
        assert_close(ours, wanted, TOLERANCE[dtype], name)
        if ours.shape[0] == sizes.rows:
            assert not ours[5:].any(), f"{name}: rows of nobody are not zero"


# ---- derivatives of derivatives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", AWKWARD[:4], ids=str)
def test_gradcheck_and_gradgradcheck_of_matmul_and_outer(sizes: Sizes) -> None:
    sizes = sizes._replace(width=min(sizes.width, 2), out=min(sizes.out, 2))
    rows = normal(sizes.rows, sizes.width).requires_grad_()
    weights = normal(len(sizes.counts), sizes.width, sizes.out, seed=1).requires_grad_()
    grads = normal(sizes.rows, sizes.out, seed=2).requires_grad_()
    for function, second in ((grouped_matmul, weights), (grouped_outer, grads)):
        inputs = (rows, second, sizes.offsets)
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("sizes", AWKWARD[:4], ids=str)
def test_gradcheck_and_gradgradcheck_of_gate_up_and_activation(sizes: Sizes) -> None:
    rows = normal(sizes.rows, sizes.width).requires_grad_()
    w1, w3 = (normal(len(sizes.counts), sizes.width, sizes.out, seed=seed).requires_grad_() for seed in (1, 2))

    order = torch.randperm(sizes.rows, generator=seeded(3))
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(sizes.rows))

    def hidden(*inputs: Tensor) -> Tensor:
        return ACTIVATED.apply(*gate_and_up(*inputs, order, inverse, sizes.offsets))[0]

    assert torch.autograd.gradcheck(hidden, (rows, w1, w3), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(hidden, (rows, w1, w3), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("sizes", AWKWARD[:4], ids=str)
def test_gradcheck_and_gradgradcheck_of_a_sum_of_two_products(sizes: Sizes) -> None:
    rows = [normal(sizes.rows, sizes.width, seed=seed).requires_grad_() for seed in (0, 1)]
    weights = [normal(len(sizes.counts), sizes.width, sizes.out, seed=seed).requires_grad_() for seed in (2, 3)]
    inputs = rows[0], weights[0], rows[1], weights[1]

    def added(*inputs: Tensor) -> Tensor:
        return GroupedSum.apply(*inputs, sizes.offsets)

    assert torch.autograd.gradcheck(added, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(added, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("case", [Shuffle(3, 2, 2, 0), Shuffle(1, 1, 1, 0), Shuffle(2, 3, 1, 1)], ids=str)
def test_gradcheck_and_gradgradcheck_of_dispatch_and_combine(case: Shuffle) -> None:
    tokens, slots, dim, _ = case
    x = normal(tokens, dim).requires_grad_()
    y, weights = normal(tokens * slots, dim).requires_grad_(), normal(tokens, slots, seed=1).requires_grad_()
    for function, inputs in (
        (dispatch_rows, (x, case.order, case.inverse, slots)),
        (combine_rows, (y, weights, case.order, case.inverse)),
    ):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


# ---- vmap == loop --------------------------------------------------------------------------------------------------


class Mappable(NamedTuple):
    """A function, R sets of inputs stacked on axis 0, and how many of them, from the left, are differentiable."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    smooth: int


RUNS = 3
COUNTS = ((2, 0, 3), (0, 0, 1), (4, 1, 2))  # rows of each expert, run by run; the rest belongs to nobody


def mappable(name: str, dtype: torch.dtype = torch.float64) -> Mappable:
    offsets = torch.stack([Sizes(counts, 0, 0, 0).offsets for counts in COUNTS])
    rows, grads = normal(RUNS, 7, 4, dtype=dtype), normal(RUNS, 7, 8, seed=1, dtype=dtype)
    weights = normal(RUNS, 3, 4, 8, seed=2, dtype=dtype)
    shuffles = [Shuffle(3, 2, 4, seed) for seed in range(RUNS)]
    order, inverse = torch.stack([s.order for s in shuffles]), torch.stack([s.inverse for s in shuffles])
    if name == "matmul":
        return Mappable(grouped_matmul, (rows, weights, offsets), 2)
    if name == "outer":
        return Mappable(grouped_outer, (rows, grads, offsets), 2)
    if name == "gated":
        both = weights.split(4, dim=-1)
        shuffles = [Shuffle(4, 2, 4, seed) for seed in range(RUNS)]  # the last row is nobody's in every run
        order, inverse = torch.stack([s.order for s in shuffles]), torch.stack([s.inverse for s in shuffles])

        def gated(x: Tensor, w1: Tensor, w3: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
            return torch.cat(gate_and_up(x, w1, w3, order, inverse, offsets), dim=-1)

        return Mappable(gated, (rows[:, :4], *both, order, inverse, offsets), 3)
    if name == "sum":
        return Mappable(GroupedSum.apply, (rows, weights, rows.flip(0), weights.flip(0), offsets), 4)
    if name == "activate":
        return Mappable(lambda *t: ACTIVATED.apply(*t)[0], (grads, grads.flip(0)), 2)
    if name == "dispatch":
        return Mappable(lambda x, o, i: dispatch_rows(x, o, i, 2), (rows[:, :3], order, inverse), 1)
    combine_weights = normal(RUNS, 3, 2, seed=3, dtype=dtype)
    return Mappable(combine_rows, (rows[:, :6], combine_weights, order, inverse), 2)


PLACES = {"matmul": 3, "outer": 3, "gated": 5, "sum": 5, "activate": 2, "dispatch": 2, "combine": 3}


def combinations() -> list[Any]:
    """Each function with every combination of mapped inputs; an order and its inverse go together."""
    every = []
    for name, places in PLACES.items():
        for mapped in itertools.product((True, False), repeat=places):
            if any(mapped):
                dims = (*mapped, mapped[-1]) if name in ("dispatch", "combine") else mapped
                dims = (*mapped[:4], mapped[3], mapped[4]) if name == "gated" else dims
                every.append(pytest.param(name, dims, id=f"{name} {''.join('M' if m else '-' for m in dims)}"))
    return every


def loop(function: Callable[..., Any], inputs: tuple[Tensor, ...], mapped: tuple[bool, ...]) -> Tensor:
    """What vmap must give: run by run, inputs that are not mapped come from run 0."""
    picked = [[t[run if m else 0] for t, m in zip(inputs, mapped, strict=True)] for run in range(RUNS)]
    return torch.stack([function(*args) for args in picked])


def mapped_inputs(inputs: tuple[Tensor, ...], mapped: tuple[bool, ...], axis: int) -> tuple[tuple, list[Tensor]]:
    """in_dims and tensors with the mapped axis moved to `axis` where the rank allows."""
    tensors = [t.movedim(0, min(axis, t.dim() - 1)) if m else t[0] for t, m in zip(inputs, mapped, strict=True)]
    return tuple(min(axis, t.dim() - 1) if m else None for t, m in zip(inputs, mapped, strict=True)), tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("name", "mapped"), combinations())
def test_vmap_equals_a_loop_whatever_is_mapped(
    name: str, mapped: tuple[bool, ...], axis: int, dtype: torch.dtype
) -> None:
    function, inputs, _ = mappable(name, dtype)
    dims, tensors = mapped_inputs(inputs, mapped, axis)
    assert_close(vmap(function, dims)(*tensors), loop(function, inputs, mapped), TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "mapped"), combinations())
def test_vmap_of_grad_equals_a_loop_of_grad(name: str, mapped: tuple[bool, ...]) -> None:
    function, inputs, smooth = mappable(name)
    dims, tensors = mapped_inputs(inputs, mapped, 0)
    for argnum in range(smooth):
        gradient = grad(lambda *args: function(*args).sin().sum(), argnums=argnum)
        assert_close(vmap(gradient, dims)(*tensors), loop(gradient, inputs, mapped), 1e-13)


@pytest.mark.parametrize(("name", "mapped"), combinations())
def test_grad_of_vmap_equals_grad_of_a_loop(name: str, mapped: tuple[bool, ...]) -> None:
    function, inputs, smooth = mappable(name)
    for argnum in range(smooth):

        def through_vmap(*tensors: Tensor) -> Tensor:
            return vmap(function, tuple(0 if m else None for m in mapped))(*tensors).sin().sum()

        def through_loop(*tensors: Tensor) -> Tensor:
            picked = [[t[run] if m else t for t, m in zip(tensors, mapped, strict=True)] for run in range(RUNS)]
            return torch.stack([function(*args) for args in picked]).sin().sum()

        _, tensors = mapped_inputs(inputs, mapped, 0)
        assert_close(grad(through_vmap, argnum)(*tensors), grad(through_loop, argnum)(*tensors), 1e-13)


@pytest.mark.parametrize("name", PLACES)
def test_nested_vmap_equals_two_loops_with_either_axis_outside(name: str) -> None:
    function, inputs, smooth = mappable(name)
    doubled = [torch.stack((t, t.flip(0))) for t in inputs]  # (2, RUNS, ...)
    wanted = torch.stack([loop(function, tuple(t[i] for t in doubled), (True,) * len(inputs)) for i in range(2)])
    assert_close(vmap(vmap(function))(*doubled), wanted, 1e-13)
    inside_out = vmap(vmap(function), in_dims=1, out_dims=1)(*doubled)
    assert_close(inside_out, wanted, 1e-13)
    only_first = (0,) + (None,) * (len(inputs) - 1)
    pairwise = vmap(vmap(function, only_first), in_dims=(None, *[0] * (len(inputs) - 1)))(inputs[0], *inputs[1:])
    crossed = [[function(first, *(t[run] for t in inputs[1:])) for first in inputs[0]] for run in range(RUNS)]
    assert_close(pairwise, torch.stack([torch.stack(row) for row in crossed]), 1e-13)
    gradient = grad(lambda *args: function(*args).sin().sum(), argnums=tuple(range(smooth)))
    for place, actual in enumerate(vmap(vmap(gradient))(*doubled)):
        ought = [
            loop(lambda *a, p=place: gradient(*a)[p], tuple(t[i] for t in doubled), (True,) * len(inputs))
            for i in (0, 1)
        ]
        assert_close(actual, torch.stack(ought), 1e-13)


@pytest.mark.parametrize("name", PLACES)
def test_forward_mode_equals_reverse_mode_alone_mapped_and_nested(name: str) -> None:
    function, inputs, smooth = mappable(name)
    places = tuple(range(smooth))
    point = tuple(t[0] for t in inputs)
    for ahead, behind in zip(jacfwd(function, places)(*point), jacrev(function, places)(*point), strict=True):
        assert_close(ahead, behind, 1e-13)

    def scalar(*args: Tensor) -> Tensor:
        return function(*args).sin().sum()

    for row_ahead, row_behind in zip(
        jacfwd(grad(scalar, places), places)(*point), jacrev(grad(scalar, places), places)(*point), strict=True
    ):
        for ahead, behind in zip(row_ahead, row_behind, strict=True):
            assert_close(ahead, behind, 1e-13)

    def directional(*args: Tensor) -> Tensor:
        tangents = tuple(t.cos() for t in args[:smooth])
        return jvp(lambda *smooth_args: function(*smooth_args, *args[smooth:]), args[:smooth], tangents)[1]

    assert_close(vmap(directional)(*inputs), loop(directional, inputs, (True,) * len(inputs)), 1e-13)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ["matmul", "outer", "combine"])
def test_jvp_with_one_tangent_only_is_the_partial_derivative(name: str, place: int) -> None:
    function, inputs, _ = mappable(name)
    point = [t[0] for t in inputs]
    tangent = normal(*point[place].shape, seed=9)

    def of_place(t: Tensor) -> Tensor:
        return function(*point[:place], t, *point[place + 1 :])

    derivative = jvp(of_place, (point[place],), (tangent,))[1]
    # each is linear in each input
    assert_close(derivative, of_place(point[place] + tangent) - of_place(point[place]), 1e-12)


# ---- the kernel that does the work ---------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the left operand of every call of the library's grouped matmul from now on."""
    calls: list[tuple[int, ...]] = []
    library = F.grouped_mm

    def spy(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(tuple(left.shape))
        return library(left, right, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    return calls


def without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "supports", lambda *_: False)


def test_without_our_kernels_aligned_float32_takes_the_librarys_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_our_kernels(monkeypatch)
    calls = counted(monkeypatch)
    function, inputs, _ = mappable("matmul", torch.float32)
    args = tuple(t[0] for t in inputs)
    upstream = normal(7, 8, dtype=torch.float32)
    vjp(lambda r, w: function(r, w, args[2]), *args[:2])[1](upstream)
    assert calls == [(7, 4), (7, 8), (4, 7)]  # out, gradient of the rows, gradient of the weights


def test_vmap_folds_all_runs_into_one_call_of_the_librarys_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    without_our_kernels(monkeypatch)
    calls = counted(monkeypatch)
    function, inputs, _ = mappable("matmul", torch.float32)
    vmap(function)(*inputs)
    assert calls == [(RUNS * 7, 4)]


def test_a_fallback_of_vmap_would_fail_these_tests() -> None:
    """Negative twin: the library's own product has no batching rule, and its warning is an error here."""
    rows, weights, offsets = mappable("matmul", torch.float32).inputs
    with pytest.raises(UserWarning, match="performance drop"):
        vmap(lambda r, w, o: F.grouped_mm(r, w, offs=o))(rows, weights, offsets)


@pytest.mark.parametrize("name", ["matmul", "outer"])
def test_the_library_kernel_and_the_loop_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_our_kernels(monkeypatch)
    function, inputs, _ = mappable(name, torch.float32)
    for run in range(RUNS):
        args = tuple(t[run] for t in inputs)
        fast = function(*args)
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "_has_fast_path", lambda *_: False)
            slow = function(*args)
        assert_close(fast, slow, 1e-6)


@pytest.mark.parametrize(
    ("shape", "dims", "wanted"),
    [
        ((0, 4), 2, (1, 0, 4)),
        ((3, 0, 4), 2, (3, 0, 4)),
        ((2, 3, 0), 1, (6, 0)),
        ((5,), 1, (1, 5)),
        ((2, 0, 3, 4), 2, (0, 3, 4)),
    ],
)
def test_axes_in_front_become_one_where_there_are_no_rows_too(
    shape: tuple[int, ...], dims: int, wanted: tuple[int, ...]
) -> None:
    assert flatten_runs(torch.zeros(shape), dims).shape == wanted


@DTYPES
def test_a_product_equals_the_librarys_with_its_gradients_transposed_and_with_an_axis_of_runs(
    dtype: torch.dtype,
) -> None:
    for shape, turned in (((7,), False), ((3, 7), False), ((2, 3, 7), True)):
        x, w = normal(*shape, 5, dtype=dtype), normal(*shape[:-1], 5, 9, seed=1, dtype=dtype)
        w = w.mT.contiguous().mT if turned else w
        out, back = vjp(dense_matmul, x, w)
        wanted, library_back = vjp(torch.matmul, x.double(), w.double())
        upstream = normal(*wanted.shape, seed=2, dtype=dtype)
        for actual, ought in zip((out, *back(upstream)), (wanted, *library_back(upstream.double())), strict=True):
            assert actual.dtype == dtype
            assert_close(actual, ought, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shapes", [((4, 5), (7, 6)), ((2, 4, 5), (4, 5, 6)), ((4, 12), (16, 4))], ids=str)
def test_sizes_that_do_not_fit_are_refused_as_by_the_library(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        dense_matmul(*(normal(*shape, dtype=torch.float32) for shape in shapes))


def test_sizes_are_compared_before_a_kernel_reads_and_not_by_the_checker_of_types_alone() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        inspect.unwrap(dense_matmul)(normal(4, 12, dtype=torch.float32), normal(16, 4, dtype=torch.float32))


def test_one_matrix_for_all_is_multiplied_with_each() -> None:
    x, w = (normal(*shape, dtype=torch.float32) for shape in ((3, 4, 5), (5, 6)))
    assert_close(dense_matmul(x, w), x.double() @ w.double(), 1e-6)
