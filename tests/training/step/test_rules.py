"""Router rules: every kind of surprise against plain autograd, every coefficient against its definition, by loops."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from tests.helpers import Case, assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.experts import Rows
from tiny_onn_func.routing import route
from tiny_onn_func.tree import flatten, stack, tree_map, unflatten, unstack, walk
from training import HyperParams, TrainState, hyper_step, init_state, per_token_surprise
from training.step.counter_rng import Purpose, random_exploration, random_normal, random_words
from training.step.regenerate import regenerate
from training.step.rules import Targets, router_targets, shuffled
from training.step.surprise import MEASURED, divide_by_expert_mean, divide_by_weight, row_dot

ROUTINGS = {"K=2": {"num_experts_per_tok": 2}, "dynamic": {}, "K=E": {"num_experts_per_tok": 4}}
BIAS = "layers.moe.router_bias"
BATCH_SHAPE = dict(batch=3, seq=6, left=(0, 2, 0), right=(0, 1, 3), unlabelled=0.3)


def situation(routing: str) -> Case:
    config = tiny_config(num_hidden_layers=3, **ROUTINGS[routing])
    return Case(config, spread_params(config, 1), tiny_batch(config, **BATCH_SHAPE), HyperParams())


def by_plain_autograd(case: Case) -> dict[str, Tensor]:
    """Every kind, from matrices that each row has for itself, zeros added to its input, and a scale of its output."""
    own: list[dict[str, Tensor]] = [{} for _ in range(case.config.num_hidden_layers)]
    rows_of: list[Rows] = []

    def private(weights: Tensor, rows: Rows) -> Tensor:
        return torch.cat((weights, torch.zeros_like(weights[:1])))[rows.expert].detach().requires_grad_()

    def gate_and_up(layer: int, x: Tensor, w1: Tensor, w3: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        x = x[rows.token]
        own[layer] |= {"w1": private(w1, rows), "w3": private(w3, rows), "x": torch.zeros_like(x).requires_grad_()}
        gate, up = (torch.einsum("nd,ndf->nf", x + own[layer]["x"], own[layer][name]) for name in ("w1", "w3"))
        return gate, up

    def down(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        rows_of.append(rows)
        own[layer] |= {"w2": private(w2, rows), "scale": hidden.new_ones(len(hidden)).requires_grad_()}
        return torch.einsum("nf,nfd->nd", hidden, own[layer]["w2"]) * own[layer]["scale"][:, None]

    logits, trace = forward(
        case.params, case.batch.input_ids, case.config, attention_mask=case.batch.attention_mask, apply_w2=down,
        apply_w13=gate_and_up,
    )  # fmt: skip
    loss = F.cross_entropy(logits.flatten(0, 1), case.batch.labels.flatten(), reduction="sum", ignore_index=-100)
    surprises = {kind: torch.full_like(trace.router_logits, torch.inf) for kind in MEASURED}
    for layer, (leaves, rows) in enumerate(zip(own, rows_of, strict=True)):
        grads = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()], retain_graph=True), strict=True))
        weights = torch.zeros_like(trace.router_logits[layer])
        for token, slot in trace.active[layer].nonzero().tolist():
            weights[token, trace.expert_ids[layer, token, slot]] = trace.weights[layer, token, slot]
        for row in range(int(rows.offsets[-1])):
            at = layer, int(rows.token[row]), int(rows.expert[row])
            weight = weights[at[1:]]
            surprises["w2"][at] = grads["w2"][row].norm()
            surprises["unweighted"][at] = grads["w2"][row].norm() / weight
            surprises["experts"][at] = sum(grads[name][row].square().sum() for name in ("w1", "w2", "w3")).sqrt()
            surprises["input"][at] = grads["x"][row].norm()
            surprises["benefit"][at] = grads["scale"][row] / weight
    return surprises


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_kind_of_surprise_equals_its_definition_by_plain_autograd(routing: str) -> None:
    case = situation(routing)
    wanted = by_plain_autograd(case)
    for kind in MEASURED:
        surprise = per_token_surprise(case.params, case.batch, case.config, case.hyper, kind=kind)
        assert_close(surprise, wanted[kind], 1e-10, f"{kind}, {routing}")
    assert (wanted["benefit"] < 0).any(), "some expert helps"


def test_unweighted_with_the_sign_turned_round_chooses_the_largest_activation_norm() -> None:
    case = situation("K=E")
    norms = torch.full((3, 18, 4), torch.inf, dtype=torch.float64)

    def watch(layer: int, hidden: Tensor, w2: Tensor, rows: Rows) -> Tensor:
        for row in range(int(rows.offsets[-1])):
            norms[layer, rows.token[row], rows.expert[row]] = hidden[row].norm()
        return torch.einsum("nf,nfd->nd", hidden, torch.cat((w2, torch.zeros_like(w2[:1])))[rows.expert])

    forward(case.params, case.batch.input_ids, case.config, attention_mask=case.batch.attention_mask, apply_w2=watch)
    real = case.batch.attention_mask.flatten() != 0
    surprise = per_token_surprise(case.params, case.batch, case.config, case.hyper, kind="unweighted")
    targets = router_targets(surprise, real, 2, -1.0)
    assert targets.informative.any()
    largest = torch.where(norms.isfinite(), norms, -1).argmax(-1)
    assert torch.equal(targets.expert[targets.informative], largest[targets.informative])


@pytest.mark.parametrize("kind", MEASURED)
def test_mapped_runs_of_every_kind_equal_the_runs_alone(kind: Any) -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch = tiny_batch(config, **BATCH_SHAPE)
    states = [init_state(config, torch.Generator().manual_seed(seed)) for seed in range(3)]
    speeds = torch.tensor([0.01, 0.02, 0.04])
    mapped, mapped_metrics = vmap(
        lambda state, lr: hyper_step(state, batch, HyperParams(router_lr=lr), config, kind=kind)
    )(stack(states), speeds)  # fmt: skip
    for run, measured, state, lr in zip(unstack(mapped), unstack(mapped_metrics), states, speeds, strict=True):
        alone, metrics = hyper_step(state, batch, HyperParams(router_lr=float(lr)), config, kind=kind)
        assert_close(measured.expert_surprise, metrics.expert_surprise, 2e-5, kind)
        for name, leaf in flatten(alone.params).items():
            assert_close(flatten(run.params)[name], leaf, 2e-3 if "router" in name else 2e-4, f"{kind}, {name}")


SURPRISES = st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0, float("inf")]), min_size=24, max_size=24)


@given(values=SURPRISES, temperature=st.sampled_from([0.05, 0.5, 1.0, 3.0]), sign=st.sampled_from([1.0, -1.0]))
def test_soft_targets_equal_their_formula_token_by_token(values: list[float], temperature: float, sign: float) -> None:
    surprise = torch.tensor(values, dtype=torch.float64).view(2, 3, 4)
    targets = router_targets(surprise, torch.ones(3, dtype=torch.bool), 2, sign, temperature)
    hard = router_targets(surprise, torch.ones(3, dtype=torch.bool), 2, sign)
    assert torch.equal(targets.expert, hard.expert)
    for layer, token in targets.informative.nonzero().tolist():
        row = surprise[layer, token]
        routed = row.isfinite()
        wanted = torch.zeros_like(row)
        wanted[routed] = (-sign * row[routed] / (temperature * row[routed].mean())).softmax(0)
        assert_close(targets.shares[layer, token], wanted, 1e-12)
    assert targets.shares.isfinite().all()


def test_a_mapped_temperature_of_zero_is_the_hard_target() -> None:
    surprise = torch.tensor([[[1.0, 2.0, torch.inf], [3.0, 0.5, 4.0]]])
    real = torch.ones(2, dtype=torch.bool)
    shares = vmap(lambda t: router_targets(surprise, real, 2, 1.0, t).shares)(torch.tensor([0.0, 1e-6]))
    wanted = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    assert torch.equal(shares[0], wanted)
    assert_close(shares[1], wanted, 1e-6)


def test_temperatures_of_runs_in_double_precision_leave_the_shares_as_wide_as_the_surprise() -> None:
    surprise = torch.rand(2, 3, 5, 4, generator=seeded(0))
    temperatures = torch.tensor([0.0, 0.5], dtype=torch.float64)
    real = torch.ones(2, 5, dtype=torch.bool)
    together = router_targets(surprise, real, 2, 1.0, temperatures).shares
    assert together.dtype == torch.float32
    for run, temperature in enumerate((1e-9, 0.5)):
        assert_close(together[run], router_targets(surprise[run], real[run], 2, 1.0, temperature).shares, 1e-6)


def test_a_weight_that_underflowed_divides_nothing() -> None:
    surprise, ids = torch.tensor([[[0.0, 4.0, torch.inf]]]), torch.tensor([[[1, 0, 2]]])
    weights, active = torch.tensor([[[0.5, 0.0, 0.0]]]), torch.tensor([[[True, True, False]]])
    assert divide_by_weight(surprise, ids, weights, active).tolist() == [[[0.0, 8.0, math.inf]]]


def test_an_expert_that_surprises_nobody_keeps_its_zeros() -> None:
    surprise = torch.tensor([[[0.0], [0.0], [torch.inf]]])
    assert divide_by_expert_mean(surprise, 1.0).flatten().tolist() == [0.0, 0.0, math.inf]


def test_values_of_both_signs_are_divided_by_their_mean_size() -> None:
    surprise = torch.tensor([[[-1.0], [3.0], [torch.inf]]])
    assert divide_by_expert_mean(surprise, 1.0).flatten().tolist() == [-0.5, 1.5, math.inf]


@given(values=SURPRISES, exponent=st.sampled_from([0.0, 0.5, 1.0]))
def test_values_are_divided_by_their_experts_mean(values: list[float], exponent: float) -> None:
    surprise = torch.tensor(values, dtype=torch.float64).view(1, 6, 4)
    divided = divide_by_expert_mean(surprise, exponent)
    for token in range(6):
        for expert in range(4):
            column = surprise[0, :, expert]
            value = surprise[0, token, expert]
            if value.isfinite():
                assert float(divided[0, token, expert]) == pytest.approx(
                    float(value / column[column.isfinite()].mean() ** exponent)
                )
            else:
                assert divided[0, token, expert] == torch.inf


@given(seed=st.integers(0, 999), teaching=st.lists(st.booleans(), min_size=10, max_size=10))
def test_shuffled_targets_keep_their_marginals_and_stay_among_the_tokens_that_teach(
    seed: int, teaching: list[bool]
) -> None:
    expert = torch.arange(20).view(2, 10)
    informative = torch.tensor([teaching, teaching[::-1]])
    shares = F.one_hot(expert, 20).double()
    targets = Targets(expert, informative, torch.zeros_like(informative), shares)
    words = random_words(seed, torch.tensor(3), Purpose.SHUFFLE, 2, 10)
    dealt = shuffled(targets, words, 1.0)
    for layer in range(2):
        keep = informative[layer]
        assert sorted(dealt.expert[layer, keep].tolist()) == sorted(expert[layer, keep].tolist())
        assert torch.equal(dealt.shares[layer, keep].argmax(-1), dealt.expert[layer, keep])
    assert_same_bits(shuffled(targets, words, torch.tensor(0.0)).expert, expert)
    assert_same_bits(shuffled(targets, words, torch.tensor(0.0)).shares, shares)


def test_a_shuffle_is_another_one_in_the_next_step_and_the_same_when_repeated() -> None:
    targets = Targets(torch.arange(64)[None], torch.ones(1, 64).bool(), torch.zeros(1, 64).bool())
    first, again, second = (
        shuffled(targets, random_words(0, torch.tensor(step), Purpose.SHUFFLE, 1, 64), 1).expert for step in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert (first != targets.expert).sum() > 50
    assert (first != second).sum() > 50


def test_hashed_normal_numbers_are_normal_and_the_streams_differ() -> None:
    drawn = [random_normal(1, torch.tensor(2), stream, 40_000) for stream in Purpose]
    for numbers in drawn:
        assert abs(float(numbers.mean())) < 0.02
        assert float(numbers.std()) == pytest.approx(1.0, abs=0.02)
        assert float((numbers.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.01)
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.02


def test_draws_of_runs_side_by_side_are_those_of_each_run_alone() -> None:
    seeds, steps, chances = torch.tensor([3, 8]), torch.tensor([0, 7]), torch.tensor([0.2, 0.9])
    words = random_words(seeds, steps, Purpose.SHUFFLE, 2, 5)
    normal = random_normal(seeds, steps, Purpose.REGENERATE, 3, 4)
    tried = random_exploration(seeds, steps, chances, 2, 50, 4)
    for run, (seed, step, chance) in enumerate(zip(seeds, steps, chances, strict=True)):
        assert_same_bits(words[run], random_words(int(seed), step, Purpose.SHUFFLE, 2, 5))
        assert_same_bits(normal[run], random_normal(int(seed), step, Purpose.REGENERATE, 3, 4))
        assert_same_bits(tried[run], random_exploration(int(seed), step, float(chance), 2, 50, 4))
    assert_same_bits(random_words(5, steps, Purpose.SHUFFLE, 3)[1], random_words(5, steps[1], Purpose.SHUFFLE, 3))


# Coefficients of the step ---------------------------------------------------------------------------------------------

CONFIG = tiny_config(num_experts_per_tok=2)
ROUTER = "layers.moe.router"


def trained(hyper: HyperParams, steps: int = 4) -> list[TrainState]:
    """The states before the first step and after each."""
    states = [init_state(CONFIG, torch.Generator().manual_seed(0))]
    for step in range(steps):
        states.append(hyper_step(states[-1], tiny_batch(CONFIG, 4, 8, step), hyper, CONFIG)[0])
    return states


def test_a_router_is_frozen_from_its_step_on_and_learns_before() -> None:
    for freeze in (2, torch.tensor(2)):
        states = trained(HyperParams(freeze_step=freeze, bias_speed=0.1, balance_weight=1.0))
        routers = [state.params["layers"]["moe"] for state in states]
        for name in ("router", "router_bias"):
            leaves = [router[name] for router in routers]
            assert [torch.equal(a, b) for a, b in pairwise(leaves)] == [False, False, True, True]
    assert not torch.equal(states[3].params["norm"], states[4].params["norm"])


def test_the_weight_of_surprise_falls_linearly_to_zero() -> None:
    falling = HyperParams(surprise_until=4, surprise_weight=0.8)
    states = trained(falling, 6)
    for step, (before, after) in enumerate(pairwise(states)):
        weight = 0.8 * max(0.0, 1 - step / 4)
        batch = tiny_batch(CONFIG, 4, 8, step)
        wanted, _ = hyper_step(before, batch, HyperParams(surprise_weight=weight), CONFIG)
        assert_close(after.params["layers"]["moe"]["router"], wanted.params["layers"]["moe"]["router"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_annealed_weight_of_surprise_has_the_precision_of_the_step(dtype: torch.dtype) -> None:
    """A third is no number of float32: rounded to it, it is off by 1e-8."""
    state, batch = init_state(CONFIG, seeded(0)), tiny_batch(CONFIG, 4, 8, 1)
    cast = partial(tree_map, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)
    state = cast(state)._replace(step=torch.tensor(2))
    moments = [
        hyper_step(state, batch, HyperParams(**how), CONFIG)[0].router_opt.mu["router"]
        for how in (dict(surprise_until=3), dict(surprise_weight=1 / 3))
    ]
    assert moments[1].abs().max() > 0
    assert_close(*moments, 1e-14 if dtype == torch.float64 else 1e-6)


def test_a_mapped_zero_means_never_for_every_new_coefficient() -> None:
    names = (
        "freeze_step",
        "surprise_until",
        "target_temperature",
        "expert_norm",
        "shuffle_targets",
        "regenerate_below",
    )
    plain = trained(HyperParams(), 2)[-1]
    for name in names:
        zeroed = trained(HyperParams(**{name: torch.tensor(0.0)}), 2)[-1]
        for leaf, wanted in zip(flatten(zeroed.params).values(), flatten(plain.params).values(), strict=True):
            assert_close(leaf, wanted, 1e-5, name)


def starving(beta2: float) -> tuple[TrainState, HyperParams]:
    """A state late enough, in which expert 3 of each layer is never chosen."""
    hyper = HyperParams(regenerate_below=0.01, beta2=beta2)
    state = init_state(CONFIG, torch.Generator().manual_seed(0))
    flat = flatten(state.params)
    bias = flat["layers.moe.router_bias"].clone()
    bias[:, 3] = -10.0
    state = state._replace(params=unflatten(flat | {"layers.moe.router_bias": bias}))
    for step in range(1, round(1 / (1 - beta2)) + 1):
        before = state
        state = hyper_step(state, tiny_batch(CONFIG, 4, 8, step), hyper, CONFIG)[0]
        own = [leaf["layers"]["moe"]["w2"][:, 3] for leaf in (before.params, state.params)]
        assert (own[0] - own[1]).abs().max() < 0.01, "it is left alone in its first steps"
    return state, hyper


def test_a_starved_expert_becomes_a_copy_of_the_busiest_and_its_optimizer_begins_anew() -> None:
    state, hyper = starving(0.75)
    batch = tiny_batch(CONFIG, 4, 8, 99)
    plain, metrics = hyper_step(state, batch, hyper._replace(regenerate_below=0.0), CONFIG)
    new, _ = hyper_step(state, batch, hyper, CONFIG)
    source = metrics.expert_load.argmax(dim=-1)
    assert (metrics.expert_load[:, 3] == 0).all()
    for layer in range(CONFIG.num_hidden_layers):
        for name in ("w1", "w2", "w3"):
            ours, theirs = (s.params["layers"]["moe"][name][layer] for s in (new, plain))
            assert_same_bits(ours[3], theirs[source[layer]], name)
            assert_same_bits(ours[:3], theirs[:3], name)
            mu, nu = (getattr(new.expert_opt, part)["layers"]["moe"][name][layer] for part in ("mu", "nu"))
            assert (mu[3] == 0).all()
            assert_same_bits(nu[3], plain.expert_opt.nu["layers"]["moe"][name][layer, source[layer]], name)
        router = new.params["layers"]["moe"]["router"][layer]
        assert (router[:, 3] - router[:, source[layer]]).abs().max() > 0, "two equal columns would never part"
        assert_same_bits(router[:, :3], plain.params["layers"]["moe"]["router"][layer, :, :3], "other columns")
        assert (new.router_opt.mu["router"][layer, :, 3] == 0).all()
    again, _ = hyper_step(new, tiny_batch(CONFIG, 4, 8, 100), hyper, CONFIG)
    weights = [s.params["layers"]["moe"]["w2"][:, 3] for s in (new, again)]
    assert (weights[0] - weights[1]).abs().max() < 0.05, "it is not replaced again at once"


def test_the_busiest_expert_is_not_replaced_by_itself_however_small_its_gradients() -> None:
    """Its column would be turned aside and its moments lost, though it is where the others come from."""
    state, hyper = init_state(CONFIG, seeded(0)), HyperParams(regenerate_below=0.5, beta2=0.5)
    for opt in (state.expert_opt, state.router_opt):
        for name, leaf in (*flatten(opt.mu).items(), *flatten(opt.nu).items()):
            leaf += 1.0
            if name.endswith("w2"):
                leaf[:, 1:3] = 0.1
    load = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).expand(CONFIG.num_hidden_layers, -1)
    new = state._replace(**regenerate(*state[:3], torch.tensor(9), load=load, hyper=hyper, router_learns=1.0))
    for name in ("w1", "w2", "w3", "router"):
        expert = -1 if name == "router" else 1
        for before, after in (
            (state.params, new.params),
            *((getattr(state.expert_opt, part), getattr(new.expert_opt, part)) for part in ("mu", "nu") if expert == 1),
        ):
            ours, theirs = (tree["layers"]["moe"][name].movedim(expert, 0) for tree in (before, after))
            assert_same_bits(theirs[1], ours[1], name)
            assert_same_bits(theirs[0], ours[0], name)
            if before is state.params:
                assert (theirs[2] != ours[2]).any(), "the other one that starves is replaced"


def test_experts_of_runs_side_by_side_are_replaced_as_those_of_each_run_alone() -> None:
    """The runs differ in the size of their routers, in who starves, and in whether it is time."""
    states = []
    for run in range(3):
        state = init_state(CONFIG, torch.Generator().manual_seed(run))
        flat = flatten(state.params)
        state = state._replace(
            params=unflatten(flat | {ROUTER: flat[ROUTER] * 10**run}), step=torch.tensor((5, 1, 9)[run])
        )
        nu = state.expert_opt.nu["layers"]["moe"]["w2"]
        nu += 1.0
        nu[:, run] = 1e-3 * torch.tensor([1.0, 100.0])[:, None, None]
        states.append(state)
    load = torch.rand(3, CONFIG.num_hidden_layers, CONFIG.num_experts, generator=seeded(5))
    hyper = HyperParams(
        regenerate_below=torch.tensor([0.01, 0.01, 0.5]), beta2=0.75, explore_seed=torch.tensor([1, 2, 3])
    )
    after = regenerate(*stack(states)[:4], load=load, hyper=hyper, router_learns=1.0)
    for run, state in enumerate(states):
        alone = HyperParams(regenerate_below=float(hyper.regenerate_below[run]), beta2=0.75, explore_seed=1 + run)
        wanted = regenerate(*state[:4], load=load[run], hyper=alone, router_learns=1.0)
        for name, leaf in walk(wanted):
            assert_close(dict(walk(after))[name][run], leaf, 1e-6, name)
    changed = (stack(states).params["layers"]["moe"]["w2"] != after["params"]["layers"]["moe"]["w2"]).flatten(3).any(-1)
    assert changed.any(-1).tolist() == [[True, False], [False, False], [True, True]]


# Hash routing ---------------------------------------------------------------------------------------------------------


def test_hash_routing_sends_a_token_to_the_same_experts_wherever_it_stands() -> None:
    config = tiny_config(num_experts_per_tok=2, routing="hash")
    batch = tiny_batch(config, 4, 9)
    ids = batch.input_ids.flatten()
    routes = [forward(spread_params(config, seed), batch.input_ids, config)[1].expert_ids for seed in (0, 1)]
    assert torch.equal(*routes), "no parameter decides"
    for token in ids.unique():
        assert (routes[0][:, ids == token] == routes[0][:, ids == token][:, :1]).all()
    assert (routes[0][0] != routes[0][1]).any(), "layers hash differently"
    assert len(routes[0].unique()) == config.num_experts


def test_hash_routing_trains_and_maps() -> None:
    config = tiny_config(num_experts_per_tok=2, routing="hash")
    batch = tiny_batch(config, 4, 9)
    states = [init_state(config, torch.Generator().manual_seed(seed)) for seed in range(2)]
    mapped, _ = vmap(lambda state: hyper_step(state, batch, HyperParams(), config))(stack(states))
    for run, state in zip(unstack(mapped), states, strict=True):
        alone, metrics = hyper_step(state, batch, HyperParams(), config)
        assert float(metrics.main_loss) > 0
        for name, leaf in flatten(alone.params).items():
            assert_close(flatten(run.params)[name], leaf, 2e-4, name)
        assert_same_bits(
            alone.params["layers"]["moe"]["router"], state.params["layers"]["moe"]["router"], "a hash learns"
        )


# Token routing --------------------------------------------------------------------------------------------------------


def test_token_routing_sends_a_token_to_the_same_experts_wherever_it_stands_as_its_router_learned() -> None:
    config = tiny_config(num_experts_per_tok=2, routing="token")
    batch = tiny_batch(config, 4, 9)
    ids = batch.input_ids.flatten()
    routes = [forward(spread_params(config, seed), batch.input_ids, config)[1].expert_ids for seed in (0, 1)]
    assert not torch.equal(*routes), "parameters decide"
    for token in ids.unique():
        assert (routes[0][:, ids == token] == routes[0][:, ids == token][:, :1]).all()
    learned = forward(spread_params(config), batch.input_ids, tiny_config(num_experts_per_tok=2))[1].expert_ids
    assert any((learned[:, ids == token] != learned[:, ids == token][:, :1]).any() for token in ids.unique()), "twin"


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_token_routing_learns_from_surprise_and_from_the_main_loss(coupling: float) -> None:
    config = tiny_config(num_experts_per_tok=2, routing="token")
    state, batch = init_state(config, torch.Generator().manual_seed(0)), tiny_batch(config, 4, 9)
    hyper = HyperParams(surprise_weight=1 - coupling, router_coupling=coupling, router_lr=1e-2, min_candidates=2)
    new, metrics = hyper_step(state, batch, hyper, config)
    assert (flatten(new.params)[ROUTER] - flatten(state.params)[ROUTER]).abs().max() > 1e-3
    assert float(metrics.main_loss) > 0


# Learned thresholds ---------------------------------------------------------------------------------------------------

COUPLED = HyperParams(surprise_weight=0.0, router_coupling=1.0, min_candidates=2)


def threshold_state(seed: int = 0, **sizes: Any) -> tuple[TrainState, ModelConfig]:
    config = tiny_config(num_experts_per_tok=-1, routing="thresholds", **sizes)
    params = flatten(spread_params(config, seed, dtype=torch.float32))
    bias = torch.randn(params[BIAS].shape, generator=torch.Generator().manual_seed(seed)).to(params[BIAS])
    start = init_state(config, torch.Generator().manual_seed(seed))
    return start._replace(params=unflatten({**params, BIAS: bias})), config


@pytest.mark.parametrize(("floor", "cap"), [(1, None), (2, None), (1, 3)])
def test_a_token_visits_exactly_the_experts_above_their_thresholds_with_equal_weights(
    floor: int, cap: int | None
) -> None:
    state, config = threshold_state(min_experts_per_tok=floor, max_experts_per_tok=cap)
    batch = tiny_batch(config, 4, 9)
    _, trace = forward(state.params, batch.input_ids, config)
    bias = flatten(state.params)[BIAS]
    counts = set()
    for layer in range(config.num_hidden_layers):
        for token in range(36):
            above = trace.router_logits[layer, token] + bias[layer]
            ranked = above.argsort(descending=True).tolist()
            wanted = [e for rank, e in enumerate(ranked) if rank < floor or above[e] > 0][:cap]
            active = trace.active[layer, token]
            assert trace.expert_ids[layer, token][active].tolist() == wanted
            torch.testing.assert_close(trace.weights[layer, token][active], torch.full((len(wanted),), 1 / len(wanted)))
            counts.add(len(wanted))
    assert len(counts) > 1, "tokens differ in their number of experts"


def test_the_gradient_passes_straight_through_the_gates() -> None:
    config = tiny_config(num_experts_per_tok=-1, routing="thresholds")
    logits = torch.randn(5, config.num_experts, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(config.num_experts, dtype=torch.float64, requires_grad=True)
    routing = route(logits, torch.ones(5, dtype=torch.bool), config, 0.5, bias)
    pull = torch.randn_like(routing.weights)
    grads = torch.autograd.grad((routing.weights * pull).sum(), (logits, bias))
    soft = (logits + bias).sigmoid()
    wanted = torch.zeros_like(logits)
    for token in range(5):
        count = int(routing.active[token].sum())
        for slot in range(config.num_experts):
            if routing.active[token, slot]:
                expert = int(routing.expert_ids[token, slot])
                slope = soft[token, expert] * (1 - soft[token, expert])
                wanted[token, expert] = pull[token, slot] * slope / count
    torch.testing.assert_close(grads[0], wanted)
    torch.testing.assert_close(grads[1], wanted.sum(dim=0))


def test_padding_opens_no_gate_and_weighs_nothing() -> None:
    config = tiny_config(num_experts_per_tok=-1, routing="thresholds")
    logits = torch.ones(3, config.num_experts, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([True, False, False])
    routing = route(logits, real, config, 0.5, torch.zeros(config.num_experts, dtype=torch.float64))
    assert torch.equal(routing.active.any(dim=-1), real)
    assert routing.weights.sum(dim=-1).tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-15)
    (slope,) = torch.autograd.grad(routing.weights[:, 0].sum(), logits)
    assert slope.isfinite().all()
    assert not slope[~real].any()


def test_thresholds_are_learned_by_the_main_loss_and_map() -> None:
    state, config = threshold_state()
    batch = tiny_batch(config, 4, 9)
    new, _ = hyper_step(state, batch, COUPLED, config)
    assert (flatten(new.params)[BIAS] != flatten(state.params)[BIAS]).any()
    decoupled, _ = hyper_step(state, batch, HyperParams(), config)
    assert torch.equal(flatten(decoupled.params)[BIAS], flatten(state.params)[BIAS]), "surprise alone moves no gate"
    states = [state, threshold_state(1)[0]]
    mapped, _ = vmap(lambda run_state: hyper_step(run_state, batch, COUPLED, config))(stack(states))
    for run, start in zip(unstack(mapped), states, strict=True):
        alone, _ = hyper_step(start, batch, COUPLED, config)
        for name, leaf in flatten(alone.params).items():
            assert_close(flatten(run.params)[name], leaf, 2e-4, name)


def test_thresholds_choose_k_themselves() -> None:
    with pytest.raises(
        ValueError, match=r"model.num_experts_per_tok: expected -1 \(dynamic\) with routing: thresholds"
    ):
        tiny_config(num_experts_per_tok=2, routing="thresholds")


def test_a_benefit_of_bfloat16_is_added_up_in_float32() -> None:
    x, grad = (torch.randn(5, 64, generator=seeded(seed)).bfloat16() for seed in (0, 1))
    assert torch.equal(row_dot(x, grad), (x.float() * grad.float()).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_candidates_that_are_equal_and_negative_are_tied_beside_others_not_visited(dtype: torch.dtype) -> None:
    surprise = torch.tensor([[[-2.0, -2.0, torch.inf], [-2.0, -1.0, torch.inf]]], dtype=dtype)
    targets = router_targets(surprise, torch.ones(2, dtype=torch.bool), 2)
    assert targets.tied.tolist() == [[True, False]]
    assert targets.informative.tolist() == [[False, True]]
