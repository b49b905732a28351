"""The compiled kernels: right to rounding, the same bits whatever the threads and the batch, and never needed."""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vmap

from tests.helpers import assert_close, seeded, tiny_batch, tiny_config
from tests.tiny_onn_func.primitives.test_fused import CASES, single, slopes
from tiny_onn_func.kernels import build, runtime
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.kernels import step as step_kernels
from tiny_onn_func.ops import swiglu
from tiny_onn_func.primitives.dispatch import combine_rows
from tiny_onn_func.primitives.fused import autograd_function
from tiny_onn_func.primitives.gate_up import gate_and_up
from tiny_onn_func.primitives.grouped import grouped_matmul
from tiny_onn_func.tree import leaves
from training import HyperParams, hyper_step, init_state
from training.step.optim import adamw_init, adamw_update

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
EPS = torch.finfo(torch.float32).eps
COUNTS = st.lists(st.integers(0, 70), min_size=1, max_size=5)
WIDTHS = st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 48, 64, 65])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def offsets_of(counts: list[int], runs: int = 1) -> Tensor:
    return torch.tensor([list(itertools.accumulate(counts))] * runs, dtype=torch.int32)


def product(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Row by row, in float64."""
    out = rows.new_zeros(*rows.shape[:2], weights.shape[-1], dtype=torch.float64)
    for run, ends in enumerate(offsets.tolist()):
        start = 0
        for expert, end in enumerate(ends):
            out[run, start:end] = rows[run, start:end].double() @ weights[run, expert].double()
            start = end
    return out


def assert_within_rounding(actual: Tensor, wanted: Tensor, size: Tensor, terms: int) -> None:
    """|error| <= terms * eps * sum of the terms' sizes: what adding `terms` products in any order may cost."""
    assert bool(((actual - wanted).abs() <= (terms + 1) * EPS * size + 1e-30).all())


@example(counts=[0, 0], inner=16, outer=32, nobody=3, transposed=False)
@example(counts=[130], inner=33, outer=65, nobody=0, transposed=True)
@given(counts=COUNTS, inner=WIDTHS, outer=WIDTHS, nobody=st.integers(0, 9), transposed=st.booleans())
def test_products_are_right_to_rounding_at_every_edge_of_a_tile(
    counts: list[int], inner: int, outer: int, nobody: int, transposed: bool
) -> None:
    runs, count = 2, sum(counts) + nobody
    offsets = offsets_of(counts, runs)
    rows, others = drawn(runs, count, inner), drawn(runs, count, inner, seed=1)
    shape = (runs, len(counts), outer, inner) if transposed else (runs, len(counts), inner, outer)
    pair = [drawn(*shape, seed=seed) for seed in (2, 3)]
    weights, more = (w.mT if transposed else w for w in pair)
    grads = drawn(runs, count, outer, seed=4)
    rows[:, sum(counts) :] = others[:, sum(counts) :] = grads[:, sum(counts) :] = torch.nan  # nobody's

    out = forward_kernels.matmul([(rows, weights)], offsets)
    assert_within_rounding(out, product(rows, weights, offsets), product(rows.abs(), weights.abs(), offsets), inner)
    both = forward_kernels.matmul([(rows, weights), (others, more)], offsets)
    wanted = product(rows, weights, offsets) + product(others, more, offsets)
    size = product(rows.abs(), weights.abs(), offsets) + product(others.abs(), more.abs(), offsets)
    assert_within_rounding(both, wanted, size, 2 * inner)
    assert not out[:, sum(counts) :].any()

    outer_product = forward_kernels.outer(rows, grads, offsets)
    for run, expert in itertools.product(range(runs), range(len(counts))):
        start, end = sum(counts[:expert]), sum(counts[: expert + 1])
        left, right = rows[run, start:end].double(), grads[run, start:end].double()
        size = left.abs().mT @ right.abs()
        assert_within_rounding(outer_product[run, expert], left.mT @ right, size, end - start)


def test_the_bits_depend_neither_on_threads_nor_on_who_else_is_there() -> None:
    counts = [70, 0, 9, 64, 1]
    rows, grads, weights = drawn(3, 150, 40), drawn(3, 150, 72, seed=1), drawn(3, 5, 40, 72, seed=2)
    offsets = offsets_of(counts, 3)
    alone = forward_kernels.matmul([(rows, weights)], offsets), forward_kernels.outer(rows, grads, offsets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = forward_kernels.matmul([(rows, weights)], offsets), forward_kernels.outer(rows, grads, offsets)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    for run in range(3):
        of_run = slice(run, run + 1)
        assert torch.equal(forward_kernels.matmul([(rows[of_run], weights[of_run])], offsets[of_run]), alone[0][of_run])
        assert torch.equal(forward_kernels.outer(rows[of_run], grads[of_run], offsets[of_run]), alone[1][of_run])
    for expert, start in ((0, 0), (2, 70), (4, 143)):  # a row alone is the row among others
        single = forward_kernels.matmul(
            [(rows[:1, start : start + 1], weights[:1, expert : expert + 1])], offsets_of([1])
        )
        assert torch.equal(single[0, 0], alone[0][0, start])


@given(st.lists(st.floats(-120, 120, width=32), min_size=1, max_size=70), st.integers(0, 9))
def test_the_activation_and_its_gradient_are_right_to_a_few_units_in_the_last_place(
    values: list[float], seed: int
) -> None:
    gate, up, grad = torch.tensor(values), drawn(len(values), seed=seed), drawn(len(values), seed=seed + 1)
    wide = [t.double().requires_grad_() for t in (gate, up)]
    wanted = torch.nn.functional.silu(wide[0]) * wide[1]
    assert torch.allclose(forward_kernels.swiglu(gate, up).double(), wanted, rtol=1e-6, atol=1e-30)
    slopes = torch.autograd.grad(wanted, wide, grad.double())
    for actual, slope, size in zip(forward_kernels.swiglu_grad(grad, gate, up), slopes, (grad * up, grad), strict=True):
        assert bool(((actual - slope).abs() <= 1e-6 * slope.abs() + 1e-6 * size.abs()).all())


def test_what_is_not_a_number_stays_so() -> None:
    bad = torch.tensor([torch.nan, 1.0] * 20)
    assert forward_kernels.swiglu(bad, torch.ones(40)).isnan().tolist() == [True, False] * 20
    assert forward_kernels.swiglu_grad(torch.ones(40), bad, torch.ones(40))[0].isnan().tolist() == [True, False] * 20
    rows, weights = torch.full((1, 3, 16), torch.nan), torch.zeros(1, 1, 16, 16)
    assert forward_kernels.matmul([(rows, weights)], offsets_of([2])).isnan().any(dim=-1).tolist() == [
        [True, True, False]
    ]


@given(
    runs=st.integers(1, 3), tokens=st.integers(0, 20), slots=st.integers(1, 4), experts=st.integers(4, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_sorted_as_by_a_stable_sort_and_combined_as_by_a_sum(
    runs: int, tokens: int, slots: int, experts: int, seed: int
) -> None:
    ids = torch.rand(runs, tokens, experts, generator=seeded(seed)).argsort(-1)[..., :slots].contiguous()
    active = torch.rand(runs, tokens, slots, generator=seeded(seed + 1)) < 0.7
    order, inverse, expert, offsets = forward_kernels.sort_rows(ids, active, experts)
    where = torch.where(active, ids, experts).flatten(1)
    wanted = where.sort(stable=True)
    assert torch.equal(expert, wanted.values)
    assert torch.equal(order, wanted.indices)
    assert torch.equal(inverse.gather(-1, order), torch.arange(tokens * slots).expand(runs, -1))
    counts = torch.nn.functional.one_hot(where, experts + 1).sum(1)[:, :experts]
    assert torch.equal(offsets.long(), counts.cumsum(-1))

    y, weights = drawn(tokens * slots, 19, seed=seed), drawn(tokens, slots, seed=seed + 1)
    rows = y[inverse[0]].view(tokens, slots, 19)
    assert_close(forward_kernels.combined_rows(y, weights, inverse[0]), (weights[..., None] * rows).sum(1), 1e-6)


def test_rows_are_sent_back_with_their_weights() -> None:
    x, weights = drawn(5, 7), drawn(5, 3, seed=1)
    order = torch.randperm(15, generator=seeded(2))
    wanted = x[order // 3] * weights.flatten()[order, None]
    assert torch.equal(forward_kernels.scaled_rows(x, weights, order), wanted)


def test_tensors_that_lie_otherwise_are_read_right() -> None:
    x, weights = drawn(7, 5).mT, drawn(3, 5, seed=1).mT
    order = torch.randperm(30, generator=seeded(2))[::2]
    assert torch.equal(
        forward_kernels.scaled_rows(x, weights, order % 15), x[order % 15 // 3] * weights.flatten()[order % 15, None]
    )


def test_leaves_and_weights_that_lie_otherwise_are_read_right() -> None:
    numbers, (p, g, mu, nu) = torch.full((2, 6), 0.1), [drawn(2, 30, seed=seed).abs() for seed in range(4)]
    wanted = step_kernels.adamw([numbers], [p], [g], [mu], [nu])
    for place in range(4):
        leaves_ = [[t.mT.contiguous().mT if at == place else t] for at, t in enumerate((p, g, mu, nu))]
        for actual, ought in zip(step_kernels.adamw([numbers], *leaves_), wanted, strict=True):
            assert torch.equal(actual[0], ought[0])

    rows, offsets, token = drawn(2, 20, 33), offsets_of([7, 13], 2), torch.arange(20).flip(0).expand(2, 20)
    stacked = drawn(2, 3, 2, 33, 40, seed=1)  # runs, layers: a layer's weights lie apart
    layer, shared = stacked[:, 1], stacked[:1, 1].expand(2, -1, -1, -1)
    for weights in (layer, shared, layer.mT.contiguous().mT, layer.transpose(1, 2).contiguous().transpose(1, 2)):
        wanted = forward_kernels.matmul([(rows, weights.contiguous())], offsets)
        assert torch.equal(forward_kernels.matmul([(rows, weights)], offsets), wanted)
        both = forward_kernels.matmul([(rows, weights), (rows, layer)], offsets)
        assert_close(both, wanted + forward_kernels.matmul([(rows, layer.contiguous())], offsets), 1e-6)
        wanted = forward_kernels.token_matmul(rows, token.contiguous(), weights.contiguous(), offsets)
        assert torch.equal(forward_kernels.token_matmul(rows, token, weights, offsets), wanted)


def test_decisions_read_tensors_that_lie_otherwise() -> None:
    logits, surprise = drawn(2, 3, 9, 5), drawn(2, 3, 9, 5, seed=1).abs()
    real, teaches = drawn(2, 9, seed=2) > 0, drawn(2, 3, 9, seed=3) > 0
    target = torch.randint(5, (2, 3, 9), generator=seeded(4))
    ids, active = drawn(2, 3, 9, 5, seed=5).argsort(-1)[..., :2].contiguous(), drawn(2, 3, 9, 2, seed=6) > 0
    rows = drawn(2, 18, 7), drawn(2, 18, 7, seed=1), torch.arange(18).repeat(2, 1) // 2, ids[:, 0].flatten(1)
    numbers = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    slopes_ = drawn(2, 3), drawn(2, 3, 5, seed=1), drawn(2, 3, seed=2)

    def decided(lie: Callable[[Tensor], Tensor]) -> list[Tensor]:
        of_tokens = [lie(t) for t in (logits, target, teaches, real)]
        choice = [lie(t) for t in (logits[:, 0].contiguous(), drawn(2, 5), torch.tensor([0.3, 0.6]).double(), real)]
        counted = [lie(t) for t in (logits, surprise, ids, active, target, teaches, ~teaches, real)]
        return [
            *forward_kernels.choose(*choice, slots=3, least=1, dynamic=True),
            step_kernels.spread_surprise(*map(lie, rows), 9, 5, is_signed=False),
            *step_kernels.least_surprised(lie(surprise), lie(real), *map(lie, numbers)),
            *step_kernels.router_sums(*of_tokens),
            step_kernels.router_sums_grad(tuple(map(lie, slopes_)), *of_tokens),
            *step_kernels.routing_sums(*counted),
        ]

    wanted = decided(lambda t: t)
    for actual, ought in zip(decided(lambda t: torch.stack((t, t), dim=-1)[..., 0]), wanted, strict=True):
        assert torch.equal(actual, ought)


def test_kernels_keep_away_from_what_is_mapped_followed_or_differentiated() -> None:
    plain, leaf = drawn(3), drawn(3).requires_grad_()
    assert runtime.usable_now(plain)
    assert not runtime.usable_now(plain, leaf)
    with torch.no_grad():
        assert runtime.usable_now(plain, leaf)
    usable = []
    vmap(lambda t: usable.append(runtime.usable_now(t)) or t)(plain)
    jvp(lambda t: usable.append(runtime.usable_now(t)) or t, (plain,), (plain,))
    assert usable == [False, False]
    assert not runtime.usable_now(plain.double())


def test_first_and_second_derivatives_by_plain_autograd_are_those_of_float64() -> None:
    """The way of a step that nobody transforms: here the kernels run forward and backward."""
    routing_order = torch.randperm(12, generator=seeded(3))
    inverse = torch.empty_like(routing_order).scatter(0, routing_order, torch.arange(12))
    offsets = torch.tensor([5, 5, 11], dtype=torch.int32)
    drawn_leaves = [drawn(6, 20), drawn(3, 20, 18, seed=1), drawn(3, 20, 18, seed=2), drawn(3, 18, 20, seed=3),
                    drawn(6, 2, seed=4)]  # fmt: skip

    def slopes(dtype: torch.dtype, order: int) -> tuple[Tensor, ...]:
        x, w1, w3, w2, weights = own = [t.to(dtype).requires_grad_() for t in drawn_leaves]
        gate, up = gate_and_up(x, w1, w3, routing_order, inverse, offsets)
        y = grouped_matmul(swiglu(gate, up), w2, offsets)
        out = (combine_rows(y, weights, routing_order, inverse) ** 2).sum()
        first = torch.autograd.grad(out, own, create_graph=order == 2)
        return first if order == 1 else torch.autograd.grad(sum((g**2).sum() for g in first), own)

    for order, tolerance in ((1, 1e-5), (2, 1e-4)):
        for actual, wanted in zip(slopes(torch.float32, order), slopes(torch.float64, order), strict=True):
            assert_close(actual, wanted, tolerance)


def test_the_optimizers_kernel_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"w": drawn(40, 500), "in": {"norm": drawn(33)}, "moe": {"w1": drawn(7)}}
    hyper, state = HyperParams(), adamw_init(params)
    for step in range(3):
        grads = {"w": drawn(40, 500, seed=step), "in": {"norm": drawn(33, seed=step)}, "moe": {"w1": torch.zeros(7)}}
        kwargs = {"lr": 0.01, "weight_decay": 0.1, "hyper": hyper, "grad_scale": 0.3, "backbone_scale": 0.5}
        updated = adamw_update(params, grads, state, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "supports", lambda *_: False)
            wanted = adamw_update(params, grads, state, **kwargs)
        for leaf, other in zip(leaves(updated), leaves(wanted), strict=True):
            assert_close(leaf, other, 1e-6)
        params, state = updated


def test_a_step_without_the_kernels_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(num_experts_per_tok=-1)
    state, batch = init_state(config, seeded(0)), tiny_batch(config, 3, 8, right=(0, 2, 5))
    (with_them, metrics) = hyper_step(state, batch, HyperParams(), config)
    monkeypatch.setattr(runtime, "supports", lambda *_: False)
    (without, metrics_without) = hyper_step(state, batch, HyperParams(), config)
    assert_close(metrics.main_loss, metrics_without.main_loss, 1e-6)
    assert_close(metrics.surprise, metrics_without.surprise, 1e-5)
    assert_close(with_them.expert_opt.mu["layers"]["moe"]["w2"], without.expert_opt.mu["layers"]["moe"]["w2"], 1e-4)


def test_products_of_tokens_are_those_of_their_rows() -> None:
    x, token = drawn(2, 30, 33), torch.randint(0, 30, (2, 100), generator=seeded(1))
    weights, grads, offsets = drawn(2, 3, 33, 65, seed=2), drawn(2, 100, 65, seed=3), offsets_of([70, 0, 9], 2)
    rows = torch.stack([x[run][token[run]] for run in range(2)])
    assert torch.equal(
        forward_kernels.token_matmul(x, token, weights, offsets), forward_kernels.matmul([(rows, weights)], offsets)
    )
    assert torch.equal(
        forward_kernels.token_outer(x, token, grads, offsets), forward_kernels.outer(rows, grads, offsets)
    )


@pytest.mark.parametrize("width", [16, 47])
def test_an_outer_product_of_more_rows_than_are_taken_at_a_time_sums_them_all(width: int) -> None:
    x, token = drawn(2, 90, 33), torch.randint(0, 90, (2, 700), generator=seeded(1))
    grads, offsets = drawn(2, 700, width, seed=2), offsets_of([5, 600, 0, 90], 2)
    rows = torch.stack([x[run][token[run]] for run in range(2)])
    products = forward_kernels.outer(rows, grads, offsets)
    for run, (expert, (start, end)) in itertools.product(
        range(2), enumerate([(0, 5), (5, 605), (605, 605), (605, 695)])
    ):
        left, right = rows[run, start:end].double(), grads[run, start:end].double()
        size = left.abs().mT @ right.abs()
        assert_within_rounding(products[run, expert], left.mT @ right, size, end - start)
    assert torch.equal(forward_kernels.token_outer(x, token, grads, offsets), products)


def test_a_transpose_of_few_rows_has_the_bits_of_one_of_many() -> None:
    rows, weights, offsets = drawn(1, 40, 48), drawn(1, 1, 80, 48, seed=1).mT, offsets_of([40])
    whole = forward_kernels.matmul([(rows, weights), (rows.flip(1), weights)], offsets)
    for count in (1, 7, 16):
        few = rows[:, :count].contiguous(), rows.flip(1)[:, :count].contiguous()
        out = forward_kernels.matmul([(few[0], weights), (few[1], weights)], offsets_of([count]))
        assert torch.equal(out, whole[:, :count])


def test_a_large_outer_product_is_written_past_the_caches_and_is_the_same() -> None:
    experts, counts = 600, [3] * 600
    rows, grads = drawn(1, 1800, 64), drawn(1, 1800, 64, seed=1)
    whole = forward_kernels.outer(rows, grads, offsets_of(counts))
    assert whole.numel() * whole.element_size() > 8 << 20
    for expert in (0, 300, experts - 1):
        part = slice(3 * expert, 3 * expert + 3)
        alone = forward_kernels.outer(rows[:, part].contiguous(), grads[:, part].contiguous(), offsets_of([3]))
        assert torch.equal(whole[0, expert], alone[0, 0])


@pytest.mark.parametrize("compiler", ["", "/nowhere/cc", "/bin/false"])
def test_without_a_compiler_nothing_is_missing(compiler: str, tmp_path: Path) -> None:
    program = (
        "import torch; from tiny_onn_func.kernels import build\n"
        "from tiny_onn_func.primitives.grouped import grouped_matmul\n"
        "assert build.library() is None\n"
        "print(grouped_matmul(torch.ones(2, 3), torch.ones(1, 3, 5), torch.tensor([2], dtype=torch.int32)).sum())"
    )
    environment = {"TINY_ONN_NATIVE_CACHE": str(tmp_path), "CC": compiler, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (ended.stdout.strip(), ended.stderr) == ("tensor(30.)", "")
    assert [*tmp_path.rglob("*.so")] == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-O3", "-mavx2", "-mfma"), ("-O2",), ("-O3", "-march=native", "-fopenmp")], ids=str)
def test_the_kernels_of_lesser_processors_compute_the_same(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_path = tmp_path / "kernels.so"
    quiet = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter")
    sources = [path for path in build.SOURCES if path.suffix == ".c"]
    subprocess.run(["cc", *flags, *quiet, "-shared", "-fPIC", "-o", library_path, *sources, "-lm"], check=True)
    here = every_kernel()
    lesser = runtime.typed(ctypes.CDLL(str(library_path)))
    for module in (forward_kernels, step_kernels):
        monkeypatch.setattr(module, "loaded", lambda: lesser)
    there = every_kernel()
    assert len(here) == len(there) > 30
    for a, b in zip(here, there, strict=True):
        assert_close(a.double(), b.double(), 4e-6)


def every_kernel() -> list[Tensor]:
    """What they give: products plain, transposed, of few and of many rows, of tokens; twins with their gradients."""
    rows, weights, offsets = drawn(2, 90, 37), drawn(2, 3, 37, 70, seed=1), offsets_of([20, 7, 63], 2)
    token, grads = torch.randint(0, 90, (2, 90), generator=seeded(2)), drawn(2, 90, 70, seed=3)
    few = [[t.flatten(1)] for t in (rows, rows, rows, rows.abs())]
    outputs = [
        forward_kernels.matmul([(rows, weights)], offsets),
        forward_kernels.matmul([(rows, weights.mT.contiguous().mT)], offsets),
        forward_kernels.outer(rows, grads, offsets), forward_kernels.token_matmul(rows, token, weights, offsets),
        forward_kernels.token_outer(rows, token, grads, offsets),
        forward_kernels.scaled_rows(rows[0], drawn(90, 1), token[0]),
        *(leaf for leaves in step_kernels.adamw([torch.full((2, 6), 0.1)], *few) for leaf in leaves),
    ]  # fmt: skip
    for twin, draw in CASES.values():
        out, slopes_ = slopes(twin, autograd_function(twin).apply, single(draw(0, 40, 24)))
        outputs += [*out, *slopes_]
    return outputs
