"""Dynamic K, dispatch and exploration: properties on routing that is uneven on purpose."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from tests.helpers import (
    Case,
    assert_close,
    assert_same_bits,
    cases,
    real_tokens,
    seeded,
    shape_router,
    spread_params,
    tiny_batch,
    tiny_config,
)
from tiny_onn_func import ModelConfig, forward, init_params
from tiny_onn_func.config import DYNAMIC_K
from tiny_onn_func.decoder import unstack_layers
from tiny_onn_func.experts import Rows, apply_experts, apply_w2
from tiny_onn_func.moe import RoutingInputs, moe
from tiny_onn_func.routing import Routing, route, send_alone
from tiny_onn_func.tree import flatten, unflatten
from training import HyperParams
from training.step.counter_rng import random_exploration


class Question(NamedTuple):
    """One call of `route`."""

    logits: Tensor
    real: Tensor
    config: ModelConfig
    budget: float
    bias: Tensor | None = None
    explore: Tensor | None = None

    @property
    def answer(self) -> Routing:
        return route(*self)

    @property
    def k(self) -> Tensor:
        return self.answer.active.sum(dim=-1)


LOGITS = ("normal", "steep", "one takes all", "tied", "partly tied", "huge", "tiny", "extremes")


def router_logits(kind: str, tokens: int, experts: int, seed: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(tokens, experts, generator=seeded(seed), dtype=torch.float64)
    shaped = {
        "normal": drawn,
        "steep": drawn * 20,
        "one takes all": drawn + 90 * torch.eye(experts)[seed % experts],
        "tied": torch.full_like(drawn, 3.0),
        "partly tied": drawn.sign(),
        "huge": drawn * 1e30,
        "tiny": drawn * 1e-30,
        "extremes": torch.where(drawn > 0.5, 1e30, torch.where(drawn < -0.5, -1e30, drawn)),
    }[kind]
    return shaped.to(dtype)


@st.composite
def questions(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = LOGITS,
    with_bias: bool = False,
    with_explore: bool = False,
    dynamic: bool = False,
) -> Question:
    """One token, one expert, all padding, K = 1, K = E and ties are within reach."""
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    fixed = st.sampled_from([1, experts]) | st.integers(1, experts)
    top_k = draw(st.just(DYNAMIC_K) if dynamic else st.just(DYNAMIC_K) | fixed)
    cap = draw(st.none() | st.integers(max(1, top_k), experts))
    config = tiny_config(
        num_experts=experts,
        num_experts_per_tok=top_k,
        min_experts_per_tok=draw(st.integers(1, top_k if top_k > 0 else cap or experts)),
        max_experts_per_tok=cap,
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 9999))
    logits = router_logits(draw(st.sampled_from(kinds)), tokens, experts, seed, dtype)
    real = draw(st.just([True] * tokens) | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    budget = draw(st.sampled_from([1e-6, 0.5, 1.0]) | st.floats(1e-6, 1.0))
    bias = explore = None
    if with_bias:
        scale = draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))
        bias = torch.randn(experts, generator=seeded(seed + 1), dtype=dtype) * scale
    if with_explore:
        chosen = st.integers(-1, experts - 1)
        explore = torch.tensor(draw(st.lists(chosen, min_size=tokens, max_size=tokens)))
    return Question(logits, torch.tensor(real), config, budget, bias, explore)


def question(rows: list[list[float]], budget: float = 0.5, **sizes: Any) -> Question:
    logits = torch.tensor(rows)
    explore, bias = sizes.pop("explore", None), sizes.pop("bias", None)
    config = tiny_config(num_experts=logits.shape[1], **sizes)
    return Question(
        logits, torch.ones(len(rows), dtype=torch.bool), config, budget,
        None if bias is None else torch.tensor(bias), None if explore is None else torch.tensor(explore),
    )  # fmt: skip


def python_softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [power / sum(powers) for power in powers]


# ---- routing -------------------------------------------------------------------------------------------------------


@given(questions())
def test_weights_sum_to_one_over_the_active_slots_and_are_zero_elsewhere(asked: Question) -> None:
    weights, active = asked.answer.weights, asked.answer.active
    wanted = asked.real.to(weights.dtype)
    assert ((weights * active).sum(dim=-1) - wanted).abs().max() <= 1e-6
    assert not weights[~active].any()
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@given(questions(with_bias=True, with_explore=True))
@example(question([[0.0, -1e30]], num_experts_per_tok=1, explore=[1]))  # its probability underflows to zero
@example(question([[0.0, -200.0]], num_experts_per_tok=1, bias=[0.0, 100.0]))
@example(question([[0.0, -90.0]], num_experts_per_tok=1, bias=[0.0, 100.0]))  # a probability below the normal numbers
def test_weights_sum_to_one_even_where_bias_or_exploration_picks_an_expert_without_probability(asked: Question) -> None:
    weights, active = asked.answer.weights, asked.answer.active
    assert ((weights * active).sum(dim=-1) - asked.real.to(weights.dtype)).abs().max() <= 1e-6
    assert not weights[~active].any()


@given(questions(with_explore=True))
def test_weights_are_the_softmax_of_the_logits_of_the_active_experts(asked: Question) -> None:
    for row, ids, weights, active in zip(asked.logits.tolist(), *asked.answer, strict=True):
        kept = [row[expert] for expert in ids[active].tolist()]
        if kept and max(kept) > max(row) - 60:
            wanted = torch.tensor(python_softmax(kept), dtype=weights.dtype)
            assert_close(weights[active], wanted, 1e-5 if weights.dtype == torch.float32 else 1e-12)


@given(questions(dynamic=True))
def test_k_is_one_plus_the_number_of_cumulative_masses_below_the_budget_with_floor_and_cap(asked: Question) -> None:
    config, ceiling = asked.config, asked.config.routes_per_token
    for row, real, k in zip(asked.logits.tolist(), asked.real.tolist(), asked.k.tolist(), strict=True):
        p = sorted(python_softmax(row), reverse=True)
        masses = [math.fsum(p[:rank]) for rank in range(1, len(p))]
        assume(all(abs(mass - asked.budget) > 1e-6 for mass in masses) or asked.budget == 1)
        wanted = 1 + sum(mass < asked.budget or asked.budget == 1 for mass in masses)
        assert k == (min(max(wanted, config.min_experts_per_tok), ceiling) if real else 0)


@pytest.mark.parametrize(
    ("experts", "budget", "k"), [(4, 0.25, 1), (4, 0.5, 2), (4, 0.75, 3), (4, 1.0, 4), (2, 0.5, 1)]
)
def test_mass_equal_to_the_budget_is_not_below_it(experts: int, budget: float, k: int) -> None:
    assert question([[0.0] * experts], budget).k.tolist() == [k]


def test_a_budget_of_one_keeps_every_expert_even_where_one_has_all_the_mass() -> None:
    assert question([[100.0, 0.0, 0.0, 0.0]], 1.0).k.tolist() == [4]


def test_logits_of_low_precision_are_decided_in_float32() -> None:
    logits = torch.randn(6, 4, generator=seeded(0))
    config, real = tiny_config(), torch.ones(6, dtype=torch.bool)
    low, wide = route(logits.bfloat16(), real, config, 0.9), route(logits.bfloat16().float(), real, config, 0.9)
    assert low.weights.dtype == torch.float32
    assert_same_bits(low, wide)


@given(questions(dynamic=True), st.floats(1e-6, 1.0))
def test_k_lies_between_one_and_e_and_grows_with_the_budget(asked: Question, other: float) -> None:
    small, large = (asked._replace(budget=budget) for budget in sorted((asked.budget, other)))
    real = asked.real
    assert (small.k[real] >= 1).all()
    assert (large.k <= asked.config.num_experts).all()
    assert (small.k <= large.k).all()
    assert torch.equal(small.answer.expert_ids, large.answer.expert_ids)
    assert not (small.answer.active & ~large.answer.active).any(), "a larger budget dropped an expert"


@given(questions())
def test_the_most_probable_expert_comes_first_and_active_slots_have_no_gap(asked: Question) -> None:
    ids, _, active = asked.answer
    p = asked.logits.softmax(dim=-1)
    ranked = p.gather(-1, ids)
    assert torch.equal(ranked[:, 0], p.amax(dim=-1))
    assert (ranked[:, :-1] >= ranked[:, 1:]).all()
    left_out = 1 - torch.zeros_like(p).scatter(-1, ids, 1.0)
    assert (p * left_out <= ranked[:, -1:]).all()
    assert not (active[:, 1:] & ~active[:, :-1]).any()


@given(questions())
def test_a_fixed_k_keeps_exactly_k_and_padding_keeps_none(asked: Question) -> None:
    assert not asked.answer.active[~asked.real].any()
    if asked.config.num_experts_per_tok != DYNAMIC_K:
        assert (asked.k[asked.real] == asked.config.num_experts_per_tok).all()


@given(questions(with_bias=True, with_explore=True))
@example(question([[0.0, 1.0, 2.0]], num_experts_per_tok=2, explore=[0]))
@example(question([[0.0, 1.0, 2.0]], num_experts_per_tok=2, explore=[1]))
@example(question([[0.0, 1.0, 2.0, 3.0]], budget=0.1, explore=[1]))
def test_the_experts_of_a_token_are_distinct_in_all_slots(asked: Question) -> None:
    ids = asked.answer.expert_ids
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < asked.config.num_experts


@given(questions(with_bias=True, with_explore=True))
def test_a_token_is_routed_the_same_bit_for_bit_whatever_its_neighbours_are(asked: Question) -> None:
    together = asked.answer
    for token in range(len(asked.real)):
        here = slice(token, token + 1)
        explore = None if asked.explore is None else asked.explore[here]
        alone = asked._replace(logits=asked.logits[here], real=asked.real[here], explore=explore).answer
        assert_same_bits(alone, Routing(*(t[here] for t in together)))


@given(questions(with_bias=True, with_explore=True))
@example(question([[5.0, 0.0, 0.0, 0.0]] * 4, budget=0.3, explore=[0, 1, 2, 3]))
@example(question([[5.0, 0.0, 0.0, 0.0]] * 4, budget=0.3, max_experts_per_tok=1, explore=[0, 1, 2, 3]))
def test_an_explored_expert_is_visited_and_displaces_the_last_one_at_most(asked: Question) -> None:
    plain, tried = asked._replace(explore=None).answer, asked.answer
    slots = asked.config.routes_per_token
    for token, wanted in enumerate(asked.explore.tolist()):
        before, after = (r.expert_ids[token][r.active[token]].tolist() for r in (plain, tried))
        if not asked.real[token]:
            assert after == []
        elif wanted == -1 or wanted in before:
            assert after == before
        else:
            assert after == [*before[: slots - 1], wanted]


@given(questions(with_bias=True, with_explore=True))
@example(question([[0.0, 1.0, 2.0]], explore=[1])._replace(real=torch.tensor([False])))
def test_a_token_that_is_sent_alone_visits_that_expert_alone_and_padding_none(asked: Question) -> None:
    routed = asked._replace(explore=None).answer
    alone = send_alone(routed, asked.explore, asked.real)
    assert all(len(set(row)) == len(row) for row in alone.expert_ids.tolist()), "experts of a token are distinct"
    for token, wanted in enumerate(asked.explore.tolist()):
        now, before = (Routing(*(part[token] for part in routing)) for routing in (alone, routed))
        if wanted == -1:
            assert_same_bits(now, before)
            continue
        only = [asked.real[token].item()] + [False] * (asked.config.routes_per_token - 1)
        assert now.expert_ids[0] == wanted
        assert now.active.tolist() == only
        assert now.weights.tolist() == [float(on) for on in only]


@given(questions(with_bias=True))
def test_exploring_nothing_leaves_every_bit(asked: Question) -> None:
    nothing = torch.full_like(asked.real, -1, dtype=torch.int64)
    assert_same_bits(asked._replace(explore=nothing).answer, asked.answer)


@given(questions(kinds=("normal",), with_bias=True))
def test_bias_changes_the_ranking_but_not_the_formula_of_the_weights(asked: Question) -> None:
    ids, weights, active = asked.answer
    config, ceiling = asked.config, asked.config.routes_per_token
    for token, row in enumerate(asked.logits.tolist()):
        p = python_softmax(row)
        score = [x + y for x, y in zip(p, asked.bias.tolist(), strict=True)]
        ranking = sorted(range(len(p)), key=lambda expert: -score[expert])[:ceiling]
        assume(all(score[a] - score[b] > 1e-5 for a, b in pairwise(ranking)))
        assert ids[token].tolist() == ranking
        kept = active[token].tolist()
        if config.num_experts_per_tok == DYNAMIC_K and asked.real[token]:
            masses = [math.fsum(p[e] for e in ranking[:rank]) for rank in range(ceiling)]
            assume(all(abs(mass - asked.budget) > 1e-6 for mass in masses) or asked.budget == 1)
            floor = config.min_experts_per_tok
            below = [mass < asked.budget or asked.budget == 1 or r < floor for r, mass in enumerate(masses)]
            assert kept == below
        total = math.fsum(p[e] for e, on in zip(ranking, kept, strict=True) if on)
        wanted = [p[e] / total if on else 0.0 for e, on in zip(ranking, kept, strict=True)]
        assert_close(weights[token], torch.tensor(wanted), 1e-5)


def test_a_strong_bias_really_changes_who_is_chosen() -> None:
    rows = [[2.0, 1.0, 0.0]]
    assert question(rows, num_experts_per_tok=1).answer.expert_ids.tolist() == [[0]]
    assert question(rows, num_experts_per_tok=1, bias=[0.0, 0.0, 1.0]).answer.expert_ids.tolist() == [[2]]


@given(questions(with_explore=True))
def test_a_bias_of_zero_is_no_bias(asked: Question) -> None:
    zero = asked.logits.new_zeros(asked.config.num_experts)
    assert_same_bits(asked._replace(bias=zero).answer, asked.answer)


# ---- dispatch: rows and a dense loop -------------------------------------------------------------------------------


def layer_params(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    return unstack_layers(spread_params(config, seed, torch.float64)["layers"], config.num_hidden_layers)[0]["moe"]


def dense_loop(x: Tensor, routing: Routing, params: dict[str, Tensor]) -> Tensor:
    """Every token and slot on its own: no sorting, no grouping, no rows."""
    out = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for expert, weight, active in zip(*(t[token] for t in routing), strict=True):
            if active:
                gate, up = x[token] @ params["w1"][expert], x[token] @ params["w3"][expert]
                total = total + weight * ((gate * torch.sigmoid(gate) * up) @ params["w2"][expert])
        out.append(total)
    return torch.stack(out)


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    loss = (out * torch.randn(out.shape, generator=seeded(5), dtype=out.dtype)).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True) if loss.requires_grad else ()


EXPERTS = ("w1", "w2", "w3")


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Relative to the largest entry or to 1, whichever is larger: a gradient may be zero but for rounding."""
    difference = (actual - wanted).detach().abs().max() / wanted.detach().abs().max().clamp_min(1.0)
    assert difference <= tolerance, f"{what}: error {difference:.3e}, allowed {tolerance:.1e}"


@given(questions(with_bias=True, with_explore=True), st.integers(0, 99))
@example(question([[9.0, 0.0, 0.0]] * 5, num_experts_per_tok=1), 0)  # two experts stay empty
@example(question([[0.0, 0.0]] * 2, num_experts_per_tok=1)._replace(real=torch.tensor([False, False])), 0)
def test_sparse_dispatch_equals_a_dense_loop_over_experts_and_tokens(asked: Question, seed: int) -> None:
    ids, weights, active = asked.answer
    params = layer_params(asked.config, seed)
    x = torch.randn(len(ids), asked.config.hidden_size, generator=seeded(seed), dtype=torch.float64)
    inputs = (x, weights.double(), *(params[name] for name in EXPERTS))
    inputs = tuple(t.detach().requires_grad_() for t in inputs)

    def run(sparse: bool) -> Tensor:
        routing, experts = Routing(ids, inputs[1], active), dict(zip(EXPERTS, inputs[2:], strict=True))
        if sparse:
            return apply_experts(inputs[0], routing, experts, 0, apply_w2)
        return dense_loop(inputs[0], routing, experts)

    out, wanted = run(True), run(False)
    assert_near(out, wanted, 1e-12, "out")
    if wanted.requires_grad:
        names = ("x", "weights", *EXPERTS)
        for ours, theirs, name in zip(gradients(out, inputs), gradients(wanted, inputs), names, strict=True):
            assert_near(ours, theirs, 1e-12, f"gradient of {name}")
    else:
        assert not any(g.any() for g in gradients(out, inputs)), "nobody was routed, somebody got a gradient"


@given(questions(kinds=("normal", "one takes all"), with_explore=True), st.integers(0, 99))
def test_a_coupled_layer_equals_a_dense_loop_that_differentiates_the_softmax(asked: Question, seed: int) -> None:
    config, params = asked.config, layer_params(asked.config, seed)
    x = torch.randn(len(asked.real), config.hidden_size, generator=seeded(seed), dtype=torch.float64)
    leaves = tuple(t.detach().requires_grad_() for t in (x, params["router"], *(params[name] for name in EXPERTS)))
    tree = {"router": leaves[1], "router_bias": params["router_bias"], **dict(zip(EXPERTS, leaves[2:], strict=True))}
    explore = asked.explore[None]
    out, trace = moe(leaves[0], tree, 0, RoutingInputs(asked.real, asked.budget, 1.0, explore), config, apply_w2)
    p = (leaves[0] @ leaves[1]).softmax(dim=-1).gather(-1, trace.expert_ids)
    mass = torch.where(trace.active, p, 0.0)
    weights = mass / mass.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    wanted = dense_loop(leaves[0], Routing(trace.expert_ids, weights, trace.active), tree)
    assert_near(out, wanted, 1e-11, "out")
    if wanted.requires_grad:
        names = ("x", "router", *EXPERTS)
        for ours, theirs, name in zip(gradients(out, leaves), gradients(wanted, leaves), names, strict=True):
            assert_near(ours, theirs, 1e-11, f"gradient of {name}")


@given(questions(), st.sampled_from([math.nan, math.inf, 1e300]), st.integers(0, 99))
def test_garbage_in_padding_reaches_neither_output_nor_gradient(asked: Question, garbage: float, seed: int) -> None:
    params = layer_params(asked.config, seed)
    clean = torch.randn(len(asked.real), asked.config.hidden_size, generator=seeded(seed), dtype=torch.float64)
    dirty = clean.masked_fill(~asked.real[:, None], garbage)
    ids, weights, active = asked.answer

    def run(x: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(t.detach().requires_grad_() for t in (x, *(params[name] for name in EXPERTS)))
        experts = dict(zip(EXPERTS, inputs[1:], strict=True))
        out = apply_experts(inputs[0], Routing(ids, weights.double(), active), experts, 0, apply_w2)
        return out, *gradients(out, inputs)

    for actual, wanted, name in zip(run(dirty), run(clean), ("out", "gradient of x", *EXPERTS), strict=True):
        assert_same_bits(actual, wanted, name)
    out, grad_x, *_ = run(dirty)
    assert not out[~asked.real].any()
    assert not grad_x[~asked.real].any()


class Seen(NamedTuple):
    """What one application of w2 was given."""

    layer: int
    hidden: Tensor
    w2: Tensor
    rows: Rows


def watch(case: Case) -> tuple[list[Seen], Any]:
    calls: list[Seen] = []

    def look(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        calls.append(Seen(layer, hidden, w2, rows))
        return apply_w2(layer, hidden, w2, rows)

    return calls, run_forward(case, apply_w2=look)[1]


def run_forward(case: Case, **more: Any) -> Any:
    batch = case.batch
    return forward(
        case.params, batch.input_ids, case.config, attention_mask=batch.attention_mask,
        surprise_budget=case.hyper.pi_alpha, **more,
    )  # fmt: skip


@given(cases())
def test_the_seam_gets_rows_sorted_by_expert_with_inactive_ones_last(case: Case) -> None:
    config = case.config
    calls, trace = watch(case)
    assert [s.layer for s in calls] == list(range(config.num_hidden_layers))
    for (layer, hidden, w2, (token, expert, offsets, order, inverse)), active, ids in zip(
        calls, trace.active, trace.expert_ids, strict=True
    ):
        tokens, slots = active.shape
        assert (token.dtype, expert.dtype, offsets.dtype) == (torch.int64, torch.int64, torch.int32)
        assert token.shape == expert.shape == (tokens * slots,)
        assert torch.equal(token, order // slots)
        assert torch.equal(order[inverse], torch.arange(tokens * slots))
        assert w2.shape == (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        assert torch.equal(w2, case.params["layers"]["moe"]["w2"][layer])
        assert torch.equal(expert, expert.sort().values)
        bounds = [0, *offsets.tolist()]
        for e in range(config.num_experts):
            mine = token[bounds[e] : bounds[e + 1]]
            assert (expert[bounds[e] : bounds[e + 1]] == e).all()
            assert torch.equal(mine, mine.sort().values), "tokens of an expert are out of order"
        assert (expert[bounds[-1] :] == config.num_experts).all()
        assert bounds[-1] == active.sum()
        routes = Counter((t, ids[t, m].item()) for t, m in active.nonzero().tolist())
        assert Counter(zip(token[: bounds[-1]].tolist(), expert[: bounds[-1]].tolist(), strict=True)) == routes
        assert Counter(token.tolist()) == Counter({t: slots for t in range(tokens)}), "every slot is one row"
        assert not hidden[bounds[-1] :].any()


def test_what_the_seam_returns_is_what_the_layer_adds() -> None:
    config, batch = tiny_config(), tiny_batch()
    params = spread_params(config)
    without = unflatten({**flatten(params), "layers.moe.w2": torch.zeros_like(params["layers"]["moe"]["w2"])})
    silent, _ = forward(
        params, batch.input_ids, config, apply_w2=lambda layer, hidden, w2, rows: apply_w2(layer, hidden, 0 * w2, rows)
    )
    assert torch.equal(silent, forward(without, batch.input_ids, config)[0])
    assert not torch.equal(silent, forward(params, batch.input_ids, config)[0])


# ---- symmetries of the whole model ---------------------------------------------------------------------------------


@given(cases(), st.sampled_from(["spread", "even", "one takes all"]), st.integers(0, 99))
def test_permuting_experts_permutes_the_routing_and_leaves_the_logits(case: Case, kind: str, seed: int) -> None:
    """Not for ties, which have no order to keep; logits far apart are ties too, of probability zero."""
    case = case._replace(params=shape_router(init_params(case.config, seeded(seed), torch.float64), kind))
    order = torch.randperm(case.config.num_experts, generator=seeded(seed))  # new expert j is the old order[j]
    flat = flatten(case.params)
    for name in ("router", "router_bias"):
        flat[f"layers.moe.{name}"] = flat[f"layers.moe.{name}"][..., order]
    for name in EXPERTS:
        flat[f"layers.moe.{name}"] = flat[f"layers.moe.{name}"][:, order]
    before, old = run_forward(case)
    after, new = run_forward(case._replace(params=unflatten(flat)))
    assert_close(after, before, 1e-11, "logits")
    assert torch.equal(order[new.expert_ids], old.expert_ids)
    assert torch.equal(new.active, old.active)
    assert_close(new.weights, old.weights, 1e-11, "weights")
    assert_close(new.router_logits, old.router_logits[..., order], 1e-11, "router logits")


@given(questions(with_explore=True), st.integers(0, 99))
def test_permuting_tokens_inside_a_layer_permutes_its_outputs(asked: Question, seed: int) -> None:
    config, params = asked.config, layer_params(asked.config, seed)
    x = torch.randn(len(asked.real), config.hidden_size, generator=seeded(seed), dtype=torch.float64)
    order = torch.randperm(len(x), generator=seeded(seed + 1))

    def run(x: Tensor, real: Tensor, explore: Tensor) -> Any:
        return moe(x, params, 0, RoutingInputs(real, asked.budget, 0.0, explore[None]), config, apply_w2)

    out, trace = run(x, asked.real, asked.explore)
    permuted, permuted_trace = run(x[order], asked.real[order], asked.explore[order])
    assert_close(permuted, out[order], 1e-12, "out")
    assert torch.equal(permuted_trace.expert_ids, trace.expert_ids[order])
    assert torch.equal(permuted_trace.active, trace.active[order])


@given(cases(), st.integers(0, 5), st.integers(0, 99))
def test_changing_later_tokens_leaves_earlier_logits_and_routes(case: Case, at: int, seed: int) -> None:
    """To 1e-12 in float64, not bit for bit: who else is in an expert's group changes the order of its sums."""
    batch, config = case.batch, case.config
    at = min(at, batch.input_ids.shape[1] - 1)
    other = torch.randint(config.vocab_size, batch.input_ids.shape, generator=seeded(seed))
    keep = torch.arange(batch.input_ids.shape[1]) <= at
    early = (keep & (batch.attention_mask != 0)).flatten()  # nobody reads what padding sees
    changed = case._replace(batch=batch._replace(input_ids=torch.where(keep, batch.input_ids, other)))
    (before, old), (after, new) = run_forward(case), run_forward(changed)
    assert_close(after.flatten(0, 1)[early], before.flatten(0, 1)[early], 1e-12, "logits")
    assert torch.equal(new.expert_ids[:, early], old.expert_ids[:, early])
    assert torch.equal(new.active[:, early], old.active[:, early])


def test_changing_an_earlier_token_does_change_later_logits() -> None:
    case = Case(tiny_config(), spread_params(tiny_config()), tiny_batch(), HyperParams())
    changed = case.batch.input_ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % case.config.vocab_size
    before, after = run_forward(case)[0], run_forward(case._replace(batch=case.batch._replace(input_ids=changed)))[0]
    assert (before != after).flatten(1).any(dim=1).all()


@given(cases(), st.integers(1, 3), st.integers(0, 99))
def test_appending_padding_changes_nothing_for_real_tokens(case: Case, more: int, seed: int) -> None:
    """To 1e-12 in float64; padding carries random tokens, in the new columns and in the old ones."""
    batch, config = case.batch, case.config
    rows, seq = batch.input_ids.shape
    noise = torch.randint(config.vocab_size, (rows, seq + more), generator=seeded(seed))
    mask = torch.nn.functional.pad(batch.attention_mask, (0, more))
    ids = torch.where(mask != 0, torch.nn.functional.pad(batch.input_ids, (0, more)), noise)
    wide = batch._replace(input_ids=ids, attention_mask=mask)
    (before, old), (after, new) = run_forward(case), run_forward(case._replace(batch=wide))
    real = batch.attention_mask != 0
    assert_close(after[:, :seq][real], before[real], 1e-12, "logits")
    assert torch.equal(new.expert_ids[:, real_tokens(wide)], old.expert_ids[:, real_tokens(batch)])
    assert torch.equal(new.active[:, real_tokens(wide)], old.active[:, real_tokens(batch)])
    assert not new.active[:, ~real_tokens(wide)].any()


@given(cases())
def test_rows_of_a_batch_do_not_see_each_other(case: Case) -> None:
    batch = case.batch
    together, trace = run_forward(case)
    seq = batch.input_ids.shape[1]
    for row in range(len(together)):
        alone, alone_trace = run_forward(case._replace(batch=type(batch)(*(t[row : row + 1] for t in batch))))
        real = batch.attention_mask[row] != 0
        assert_close(alone[0][real], together[row][real], 1e-12, "logits")
        here = slice(row * seq, (row + 1) * seq)
        assert torch.equal(alone_trace.active, trace.active[:, here])


@pytest.mark.parametrize(("kind", "k"), [("tied", 2), ("one takes all", 4), ("huge", 1), ("tiny", 2)])
def test_every_kind_of_router_gives_the_k_that_its_name_promises(kind: str, k: int) -> None:
    config, batch = tiny_config(), tiny_batch()
    params = shape_router(init_params(config, seeded(0), torch.float64), kind)
    _, trace = forward(params, batch.input_ids, config)
    counts = trace.active.sum(dim=-1)
    if kind == "one takes all":  # the bias puts the last expert first; how many follow is the budget's choice
        assert (trace.expert_ids[..., 0] == config.num_experts - 1).all()
        assert counts.max() <= k
    else:
        assert (counts == k).all()


# ---- which tokens explore ------------------------------------------------------------------------------------------

LAYERS, TOKENS, NUM_EXPERTS = 4, 8192, 7


def drawn(seed: Any = 0, step: int = 0, probability: Any = 0.3, experts: int = NUM_EXPERTS) -> Tensor:
    return random_exploration(seed, torch.tensor(step), probability, LAYERS, TOKENS, experts)


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_share_of_tokens_that_explore_is_the_probability(seed: int, probability: float) -> None:
    for step in (0, 1, 1000):
        tries = drawn(seed, step, probability) >= 0
        spread = math.sqrt(probability * (1 - probability) / TOKENS)
        assert ((tries.float().mean(dim=1) - probability).abs() < 5 * spread).all(), "share of a layer"


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_explored_experts_are_uniform_in_every_layer(seed: int) -> None:
    for layer in drawn(seed, probability=1.0):
        counts = torch.bincount(layer, minlength=NUM_EXPERTS).double()
        expected = TOKENS / NUM_EXPERTS
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < NUM_EXPERTS - 1 + 6 * math.sqrt(2 * (NUM_EXPERTS - 1)), counts.tolist()


def test_probability_zero_explores_nothing_and_one_everything() -> None:
    assert (drawn(probability=0.0) == -1).all()
    assert (drawn(probability=1.0) >= 0).all()
    assert (drawn(probability=1.0, experts=1) == 0).all()
    assert drawn(probability=1.0).max() == NUM_EXPERTS - 1


def test_exploration_is_a_pure_function_of_seed_and_step() -> None:
    torch.manual_seed(1)
    first = drawn(3, 5)
    torch.manual_seed(2)
    assert torch.equal(first, drawn(3, 5))
    assert torch.equal(first, drawn(torch.tensor(3.0), 5, torch.tensor(0.3)))


@pytest.mark.parametrize("other", [dict(seed=4), dict(step=6), dict(seed=5, step=3)])
def test_another_seed_or_step_explores_independently(other: dict[str, int]) -> None:
    """Two independent draws agree on who explores as often as chance: p^2 of the tokens, within 5 deviations."""
    first, second = drawn(3, 5), drawn(**{"seed": 3, "step": 5, **other})
    both = ((first >= 0) & (second >= 0)).double().mean()
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / (LAYERS * TOKENS))
    same = (first == second)[(first >= 0) & (second >= 0)].double().mean()
    chance = 1 / NUM_EXPERTS
    assert abs(same - chance) < 5 * math.sqrt(chance * (1 - chance) / (0.09 * LAYERS * TOKENS))


def test_layers_and_neighbouring_tokens_explore_independently() -> None:
    tries = (drawn() >= 0).double() - 0.3
    spread = 5 * 0.21 / math.sqrt(TOKENS)
    assert (tries[0] * tries[1]).mean().abs() < spread
    assert (tries[:, 1:] * tries[:, :-1]).mean().abs() < spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_keeps_as_many_experts_whatever_form_it_has(dtype: torch.dtype) -> None:
    """At exact ties: E equal probabilities, and a budget of j / E. A float32 number is what float32 holds of it."""
    for experts in range(2, 25):
        config, logits, real = tiny_config(num_experts=experts), torch.zeros(1, experts, dtype=dtype), torch.ones(1) > 0
        for j in range(1, experts + 1):
            number, mass, kept = j / experts, 0.0, 0
            for _ in range(experts):
                kept, mass = kept + (mass < number or number >= 1), mass + 1 / experts
            same = torch.tensor(number, dtype=dtype)  # float64 in float32 runs is rounded, float32 in float64 runs was
            forms = [number, same, same.double(), torch.tensor(number, dtype=torch.float64)]
            forms += [same.float()] if dtype == torch.float32 else []
            counts = [int(route(logits, real, config, form).active.sum()) for form in forms]
            mapped = vmap(lambda budget, *rest: route(*rest, budget).active.sum(), in_dims=(0, None, None, None))
            counts += mapped(torch.stack([same, same]), logits, real, config).tolist()
            assert len(set(counts)) == 1, f"{j} / {experts}: {counts}"
            assert dtype == torch.float32 or counts[0] == kept, f"{j} / {experts}: {counts}, expected {kept}"
