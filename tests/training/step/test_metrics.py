"""Metrics equal plain loops, keep their promises in uneven cases, and map."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from training.step.metrics import average_k, dead_experts, load_entropy, max_vio, shares
from training.step.sums import counts, finite_sum, routed_rows

KINDS = ("random", "one expert takes all", "nothing routed", "one layer idle", "all padding")


class Case(NamedTuple):
    """A routing of L layers, T tokens, M slots, E experts, and a surprise surface."""

    expert_ids: Tensor
    active: Tensor
    mask: Tensor
    surprise: Tensor
    experts: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    experts = draw(st.integers(1, 6))
    slots = draw(st.integers(1, experts))
    return make_case(draw(st.integers(0, 2**31)), draw(st.sampled_from(KINDS)), layers, tokens, slots, experts)


def make_case(seed: int, kind: str, layers: int, tokens: int, slots: int, experts: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.rand(layers, tokens, experts, generator=generator).argsort(dim=-1)[..., :slots]
    mask = (torch.rand(tokens, generator=generator) < 0.7).to(torch.int64)
    active = (torch.rand(layers, tokens, slots, generator=generator) < 0.6) & (mask != 0)[:, None]
    if kind == "one expert takes all":
        expert_ids, active = torch.full_like(expert_ids, experts - 1), active & (torch.arange(slots) == 0)
    elif kind == "nothing routed":
        active = torch.zeros_like(active)
    elif kind == "one layer idle":
        active[0] = False
    elif kind == "all padding":
        mask, active = torch.zeros_like(mask), torch.zeros_like(active)
    surprise = torch.rand(layers, tokens, experts, generator=generator)
    surprise[torch.rand(surprise.shape, generator=generator) < 0.5] = torch.inf
    return Case(expert_ids, active, mask, surprise, experts)


def looped_shares(index: list, counted: list, bins: int) -> list:
    """Shares by counting with Python integers."""
    rows = []
    for layer_index, layer_counted in zip(index, counted, strict=True):
        counts = [0] * bins
        for value, is_counted in zip(layer_index, layer_counted, strict=True):
            counts[value] += bool(is_counted)
        rows.append([n / max(sum(counts), 1) for n in counts])
    return rows


def expert_load(expert_ids: Tensor, active: Tensor, experts: int) -> Tensor:
    return shares(routed_rows(expert_ids, active, experts))


def mean_finite(x: Tensor, dim: int | None = None) -> Tensor:
    total, finite = finite_sum(x, dim)
    return total / finite.clamp_min(1)


def check(got: Tensor, wanted: object) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float32))


@given(cases())
def test_expert_load_is_the_counted_share_of_routed_rows(case: Case) -> None:
    load = expert_load(case.expert_ids, case.active, case.experts)
    flat = (case.expert_ids.flatten(1).tolist(), case.active.flatten(1).tolist())
    check(load, looped_shares(*flat, case.experts))
    check(load.sum(dim=-1), [float(layer.any()) for layer in case.active])


@given(cases())
def test_target_load_is_the_counted_share_of_informative_tokens(case: Case) -> None:
    targets, informative = case.expert_ids[..., 0], case.active[..., 0]
    check(
        shares(counts(targets, informative, case.experts)),
        looped_shares(targets.tolist(), informative.tolist(), case.experts),
    )


@given(cases())
def test_slots_that_are_not_active_do_not_count_whatever_they_hold(case: Case) -> None:
    garbage = torch.where(case.active, case.expert_ids, 10**9)
    assert torch.equal(
        expert_load(garbage, case.active, case.experts), expert_load(case.expert_ids, case.active, case.experts)
    )


@given(cases())
def test_summaries_of_load_equal_loops(case: Case) -> None:
    load = expert_load(case.expert_ids, case.active, case.experts)
    violations, entropies, dead = [], [], 0
    for row in load.tolist():
        mean = sum(row) / len(row)
        violations.append((max(row) - mean) / mean if mean else 0.0)
        entropy = -sum(p * math.log(p) for p in row if p)
        entropies.append(0.0 if not mean else 1.0 if len(row) == 1 else entropy / math.log(len(row)))
        dead += row.count(0.0)
    check(max_vio(load), sum(violations) / len(violations))
    check(load_entropy(load), sum(entropies) / len(entropies))
    check(dead_experts(load), float(dead))


@given(cases(), st.booleans())
def test_average_k_is_the_mean_count_over_real_tokens(case: Case, boolean: bool) -> None:
    counts = [
        sum(slots)
        for layer in case.active.tolist()
        for slots, real in zip(layer, case.mask.tolist(), strict=True)
        if real
    ]
    mask = case.mask.bool() if boolean else case.mask
    check(average_k(case.active, mask), sum(counts) / max(len(counts), 1))


@given(cases())
def test_means_of_surprise_are_over_finite_entries(case: Case) -> None:
    def mean(values: list) -> float:
        kept = [v for v in values if math.isfinite(v)]
        return sum(kept) / max(len(kept), 1)

    layers = case.surprise.mT.tolist()
    check(mean_finite(case.surprise, 1), [[mean(expert) for expert in layer] for layer in layers])
    check(mean_finite(case.surprise), mean(case.surprise.flatten().tolist()))


def test_extremes_have_their_textbook_values() -> None:
    alone, even, idle = torch.eye(8)[:1], torch.full((1, 8), 1 / 8), torch.zeros(1, 8)
    for load, vio, entropy, dead in ((alone, 7.0, 0.0, 7.0), (even, 0.0, 1.0, 0.0), (idle, 0.0, 0.0, 8.0)):
        check(max_vio(load), vio)
        check(load_entropy(load), entropy)
        check(dead_experts(load), dead)
    check(mean_finite(torch.full((2, 3, 4), torch.inf)), 0.0)
    check(dead_experts(torch.tensor([[0.99, 0.01, 0.0]])), 1.0)  # a small load is not none


def test_float64_surprise_keeps_its_precision() -> None:
    surprise = torch.tensor([[[1.0, torch.inf], [1.0 + 1e-12, torch.inf]]], dtype=torch.float64)
    assert mean_finite(surprise).item() == pytest.approx(1.0 + 5e-13, abs=1e-15)
    assert mean_finite(surprise, 1).dtype == torch.float64


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_mapped_metrics_equal_a_loop_bit_for_bit(seed: int, experts: int, tokens: int) -> None:
    runs = [make_case(seed + i, kind, 2, tokens, experts, experts) for i, kind in enumerate(KINDS)]
    ids, active, mask, surprise = (torch.stack(field) for field in list(zip(*runs, strict=True))[:4])

    def measured(ids: Tensor, active: Tensor, mask: Tensor, surprise: Tensor) -> tuple[Tensor, ...]:
        load = expert_load(ids, active, experts)
        loads = (load, shares(counts(ids[..., 0], active[..., 0], experts)))
        summaries = (max_vio(load), dead_experts(load), load_entropy(load), average_k(active, mask))
        return (*loads, *summaries, mean_finite(surprise, 1), mean_finite(surprise))

    looped = [torch.stack(values) for values in zip(*map(measured, ids, active, mask, surprise), strict=True)]
    for got, wanted in zip(vmap(measured)(ids, active, mask, surprise), looped, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)])
def test_either_input_alone_may_be_mapped(in_dims: tuple[int | None, int | None]) -> None:
    runs = [make_case(i, "random", 2, 5, 3, 4) for i in range(3)]
    ids = torch.stack([run.expert_ids for run in runs]) if in_dims[0] == 0 else runs[0].expert_ids
    active = torch.stack([run.active for run in runs]) if in_dims[1] == 0 else runs[0].active
    mapped = vmap(lambda ids, active: expert_load(ids, active, 4), in_dims=in_dims)(ids, active)
    for i in range(3):
        alone = expert_load(ids[i] if in_dims[0] == 0 else ids, active[i] if in_dims[1] == 0 else active, 4)
        assert torch.equal(mapped[i], alone)
