"""What the router decides and learns from: each kernel equals the plain way, on awkward numbers too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from tests.helpers import seeded
from tiny_onn_func.config import ModelConfig
from tiny_onn_func.experts import sort_by_expert
from tiny_onn_func.kernels import build, runtime
from tiny_onn_func.kernels import forward as forward_kernels
from tiny_onn_func.ops import as_wide_as
from tiny_onn_func.routing import route
from training.step.rules import router_targets
from training.step.sums import _routing_sums, finite_sum
from training.step.surprise import scatter_surprise

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler to make the kernels with")
EXPERTS = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64, 70])  # around whole vectors
SIZES = {"tokens": st.integers(1, 40), "experts": EXPERTS, "seed": st.integers(0, 99)}


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "supports", lambda *_: False)
        yield


def both(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """By the kernels, and without."""
    with_them = function(*inputs)
    with without_kernels():
        return with_them, function(*inputs)


def same(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        if actual.is_floating_point():
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
        else:
            assert torch.equal(actual, expected)


def some_surprise(layers: int, tokens: int, experts: int, seed: int) -> Tensor:
    """With gaps, ties, zeros, negative numbers, infinities and what is no number."""
    drawn = torch.randn(layers, tokens, experts, generator=seeded(seed)).mul(3).round().div(3)
    kind = torch.randint(12, drawn.shape, generator=seeded(seed + 1))
    for place, value in ((0, torch.inf), (1, torch.inf), (2, -torch.inf), (3, torch.nan), (4, 0.0)):
        drawn = torch.where(kind == place, value, drawn)
    return drawn


def config_of(experts: int, slots: int) -> ModelConfig:
    return ModelConfig(13, 8, 1, 1, 1, 8, 6, experts, num_experts_per_tok=slots)


@example(tokens=1, experts=1, seed=0, least=1, sign=1.0)
@given(**SIZES, least=st.integers(0, 3), sign=st.sampled_from([1.0, -1.0, 0.5]))
def test_targets_are_those_of_the_plain_way(tokens: int, experts: int, seed: int, least: int, sign: float) -> None:
    surprise = some_surprise(2, tokens, experts, seed)
    real = torch.rand(tokens, generator=seeded(seed + 2)) < 0.8
    ours, theirs = both(router_targets, surprise, real, least, sign)
    same(ours[:3], theirs[:3])
    assert not ours.informative[:, ~real].any()


@given(**SIZES)
def test_sums_over_tokens_are_those_of_the_plain_way(tokens: int, experts: int, seed: int) -> None:
    slots, surprise = min(experts, 1 + seed % 4), some_surprise(2, tokens, experts, seed)
    logits = torch.randn(2, tokens, experts, generator=seeded(seed)).mul(2).round()
    real = torch.rand(tokens, generator=seeded(seed + 2)) < 0.8
    ids = torch.rand(2, tokens, experts, generator=seeded(seed + 3)).argsort(dim=-1)[..., :slots]
    active = torch.rand(2, tokens, slots, generator=seeded(seed + 4)) < 0.7  # on padding, too: no visit counts there
    target, informative, tied, _ = router_targets(surprise, real, 1)
    same(*both(_routing_sums, logits, surprise, ids, active, target, informative, tied, real), tolerance=1e-5)
    sizes = _routing_sums(logits, surprise, ids, active, target, informative, tied, real)[-2:]
    same(sizes, finite_sum(surprise, dim=-2), tolerance=1e-5)


@given(**SIZES, signed=st.booleans())
def test_a_surface_is_that_of_the_plain_way(tokens: int, experts: int, seed: int, signed: bool) -> None:
    slots = min(experts, 3)
    real = torch.rand(tokens, generator=seeded(seed)) < 0.8
    routing = route(torch.randn(tokens, experts, generator=seeded(seed + 1)), real, config_of(experts, slots), 0.5)
    rows = sort_by_expert(routing, experts)
    left = torch.randn(tokens * slots, 19, generator=seeded(seed + 2))
    right = torch.randn(tokens * slots, 19 if signed else 33, generator=seeded(seed + 3))
    ours, theirs = both(lambda: (scatter_surprise(left, right, rows, tokens, experts, is_signed=signed),))
    same(ours, theirs, tolerance=1e-5)
    assert int(ours[0].isfinite().sum()) == int(routing.active.sum())


def test_surfaces_of_mapped_runs_are_those_of_the_runs_alone() -> None:
    real, logits = torch.rand(3, 9, generator=seeded(0)) < 0.8, torch.randn(3, 9, 7, generator=seeded(1))
    left, right = torch.randn(3, 18, 5, generator=seeded(2)), torch.randn(3, 18, 5, generator=seeded(3))

    def surface(left: Tensor, right: Tensor, logits: Tensor, real: Tensor, signed: bool) -> Tensor:
        rows = sort_by_expert(route(logits, real, config_of(7, 2), 0.5), 7)
        return scatter_surprise(left, right, rows, 9, 7, is_signed=signed)

    for signed in (False, True):
        args = left, right, logits, real
        mapped = vmap(surface, (0, 0, 0, 0, None))(*args, signed)
        same(mapped, [surface(*(t[run] for t in args), signed) for run in range(3)])


@given(**SIZES, grid=st.sampled_from([0.0, 1.0, 100.0]))
def test_the_best_are_those_of_a_sort_by_score_then_logit_then_place(
    tokens: int, experts: int, seed: int, grid: float
) -> None:
    """Scores tie on purpose: logits on a grid, all of them equal, or so far apart that most probabilities are 0."""
    logits = torch.randn(1, tokens, experts, generator=seeded(seed)).mul(2).round() * grid
    bias = torch.randint(3, (1, experts), generator=seeded(seed + 1)) / 4.0
    real, budget = torch.ones(1, tokens, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    for slots in {1, min(3, experts), min(20, experts), experts}:
        weights, ids, active = forward_kernels.choose(logits, bias, budget, real, slots=slots, least=1, dynamic=False)
        scores = forward_kernels.choose(logits, 0 * bias, budget, real, slots=experts, least=1, dynamic=False)
        p = torch.zeros(tokens, experts).scatter(-1, scores[1][0], scores[0][0])
        for token in range(tokens):
            keys = [(-float(p[token, e] + bias[0, e]), -float(logits[0, token, e]), e) for e in range(experts)]
            assert ids[0, token].tolist() == [e for *_, e in sorted(keys)][:slots]
        assert active.all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, tokens))


@given(**SIZES, budget=st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]), least=st.integers(1, 3), even=st.booleans())
@example(tokens=3, experts=24, seed=0, budget=0.5, least=1, even=True)  # the masses of equals end on the budget
@example(tokens=3, experts=38, seed=0, budget=0.5, least=1, even=True)
def test_dynamic_k_is_that_of_the_plain_way(
    tokens: int, experts: int, seed: int, budget: float, least: int, even: bool
) -> None:
    logits = torch.zeros(tokens, experts) if even else 3 * torch.randn(tokens, experts, generator=seeded(seed))
    real = torch.rand(tokens, generator=seeded(seed + 1)) < 0.8
    config = replace(config_of(experts, -1), min_experts_per_tok=min(least, experts))
    ours, theirs = both(route, logits, real, config, budget)
    assert torch.equal(ours.active, theirs.active)
    same(ours, theirs, tolerance=1e-5)


@given(**SIZES, what=st.sampled_from(["grid", "one ulp", "tiny", "nan", "inf"]), top_k=st.sampled_from([-1, 1, 3]))
def test_both_ways_choose_the_same_experts_where_it_is_close(
    tokens: int, experts: int, seed: int, what: str, top_k: int
) -> None:
    """Ties, gaps of one ulp and of 1e-39, and numbers that are none; a router of zeros has all of the first."""
    logits = torch.randn(tokens, experts, generator=seeded(seed)).round()
    if what == "one ulp":
        up = torch.rand(tokens, experts, generator=seeded(seed + 1)) < 0.5
        logits = torch.where(up, torch.nextafter(logits, logits + 1), logits)
    elif what == "tiny":
        logits = 1e-39 * logits
    elif what in ("nan", "inf"):
        logits[torch.arange(tokens) % 2 == 0, seed % experts] = float(what)
    config, real = config_of(experts, min(top_k, experts)), torch.ones(tokens, dtype=torch.bool)
    ours, theirs = both(route, logits, real, config, 0.5)
    whole = logits.isfinite().all(dim=-1)  # of a broken token the weights are NaN, whichever experts it has
    assert torch.equal(ours.active, theirs.active)
    assert torch.equal(ours.expert_ids[whole], theirs.expert_ids[whole])
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert bool(ours.weights[~whole][ours.active[~whole]].isnan().all())


def test_a_followed_gradient_is_that_of_the_experts_that_were_chosen() -> None:
    """All logits tie, so another sort might order them otherwise."""
    numbers, real = torch.randn(5, 4, generator=seeded(0)), torch.ones(5, dtype=torch.bool)

    def value(logits: Tensor) -> Tensor:
        routing = route(logits, real, config_of(4, 4), 0.5)
        return (routing.weights * numbers.gather(-1, routing.expert_ids)).sum()

    tied = torch.zeros(5, 4)
    leaf = tied.clone().requires_grad_()
    once, twice = torch.autograd.grad(value(leaf), leaf), torch.autograd.grad(value(leaf), leaf, create_graph=True)
    wanted = (numbers - numbers.mean(dim=-1, keepdim=True)) / 4
    for gradient in (once[0], twice[0], grad(value)(tied)):
        torch.testing.assert_close(gradient, wanted)


def test_a_bias_and_a_mask_of_all_runs_are_those_of_each() -> None:
    logits, bias = torch.randn(3, 5, 4, generator=seeded(0)), torch.tensor([0.0, 0.5, 0.0, -0.5])
    real = torch.tensor([True, True, False, True, True])
    together = route(logits, real, config_of(4, 2), 0.5, bias)
    for run in range(3):
        same([t[run] for t in together], route(logits[run], real, config_of(4, 2), 0.5, bias))


def test_what_is_not_a_number_comes_last_and_shows_in_the_weights() -> None:
    logits = torch.tensor([[[1.0, 2.0, 2.0, torch.nan, -torch.inf], [torch.nan] * 5]])
    args = torch.zeros(1, 5), torch.ones(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    weights, ids, _ = forward_kernels.choose(logits, *args, slots=5, least=1, dynamic=False)
    assert ids.tolist() == [[[1, 2, 0, 3, 4], [0, 1, 2, 3, 4]]]
    assert weights.isnan().all()


@pytest.mark.parametrize("experts", [5, 40])
def test_one_logit_that_is_not_a_number_shows_in_the_weights_of_all_that_are_chosen(experts: int) -> None:
    logits = torch.randn(1, 3, experts, generator=seeded(0))
    logits[0, 1, 2] = torch.nan
    args = torch.zeros(1, experts), torch.ones(1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    weights, ids, _ = forward_kernels.choose(logits, *args, slots=2, least=1, dynamic=False)
    assert not (ids[0, 1] == 2).any()
    assert weights.isnan().all(dim=-1).tolist() == [[False, True, False]]


def test_mapped_runs_choose_each_by_its_own_bias_and_budget() -> None:
    logits, bias = torch.randn(3, 9, 7, generator=seeded(0)), torch.randn(3, 7, generator=seeded(1))
    real, budgets = torch.rand(3, 9, generator=seeded(2)) < 0.7, torch.tensor([0.2, 0.6, 0.9])
    config = config_of(7, -1)
    mapped = vmap(lambda logits, real, budget, bias: route(logits, real, config, budget, bias))(
        logits, real, budgets, bias
    )
    for run in range(3):
        alone = route(logits[run], real[run], config, float(budgets[run]), bias[run])
        assert all(torch.equal(of_runs[run], of_run) for of_runs, of_run in zip(mapped, alone, strict=True))
    shared = vmap(lambda logits: route(logits, real[0], config, 0.6, bias[1]))(logits)
    assert torch.equal(shared.expert_ids[2], route(logits[2], real[0], config, 0.6, bias[1]).expert_ids)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mask_of_all_runs_asks_of_each_what_it_asks_of_one(sign: float, dtype: torch.dtype) -> None:
    surprise, real = some_surprise(6, 9, 7, 0).view(3, 2, 9, 7).to(dtype), torch.rand(9, generator=seeded(1)) < 0.7
    together = router_targets(surprise, real, 2, sign)
    for run in range(3):
        same([t[run] for t in together[:3]], router_targets(surprise[run], real, 2, sign)[:3])


def test_runs_of_a_vmap_are_decided_each_for_itself() -> None:
    surprise, real = some_surprise(6, 9, 7, 0).view(3, 2, 9, 7), torch.rand(3, 9, generator=seeded(1)) < 0.7
    least, sign = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.5])
    mapped = vmap(lambda *args: tuple(router_targets(*args)[:3]))(surprise, real, least, sign)
    for run in range(3):
        alone = router_targets(surprise[run], real[run], float(least[run]), float(sign[run]))
        same([t[run] for t in mapped], alone[:3])


def test_a_number_of_each_run_is_where_what_it_meets_is() -> None:
    there = torch.zeros(2, 3, 4, device="meta")
    assert as_wide_as(there, torch.ones(2)).device == there.device
    assert as_wide_as(there, torch.ones(2)).shape == (2, 1, 1)
    assert as_wide_as(there, 0.5) == 0.5
