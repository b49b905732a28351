"""The counterfactual oracle against whole forward passes with one token sent elsewhere, and what is made of it."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import tiny_onn_func.moe
from tests.helpers import spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.routing import route
from tiny_onn_func.tree import stack, unstack
from training import Batch, HyperParams, hyper_step, init_state, per_token_surprise
from training.step.batch import IGNORE_INDEX
from training.step.oracle import PICKS, counterfactual_losses, draw_sample, fill_sampled, regret
from training.study.routing_analysis import co_activation_facts, drift, regret_facts

SIZES: dict[str, dict[str, Any]] = {
    "dynamic K": {}, "K = 1": {"num_experts_per_tok": 1}, "K = E": {"num_experts_per_tok": 4},
    "by token": {"num_experts_per_tok": 2, "routing": "token"},
}  # fmt: skip
UNEVEN = dict(batch=2, seq=5, left=(0, 2), right=(1, 0), unlabelled=0.3)


def by_whole_passes(params: Any, batch: Batch, config: ModelConfig, layer: int, token: int, expert: int) -> float:
    """The loss of one token in a forward pass in which a patched `route` sends it to one expert alone."""
    calls = itertools.count()

    def elsewhere(logits: Tensor, *rest: Any) -> Any:
        routing = route(logits, *rest)
        if next(calls) != layer:
            return routing
        ids, weights, active = (part.clone() for part in routing)
        ids[token, 0], weights[token], active[token] = expert, 0.0, False
        weights[token, 0], active[token, 0] = 1.0, True
        return routing._replace(expert_ids=ids, weights=weights, active=active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_onn_func.moe, "route", elsewhere)
        logits, _ = forward(params, batch.input_ids, config, attention_mask=batch.attention_mask)
    return float(F.cross_entropy(logits.flatten(0, 1)[token], batch.labels.flatten()[token]))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_fork_costs_what_a_whole_pass_with_that_token_sent_elsewhere_costs(sizes: dict[str, Any]) -> None:
    config = tiny_config(num_hidden_layers=3, **sizes)
    params, batch = spread_params(config, 3), tiny_batch(config, **UNEVEN)
    sample = torch.arange(5).expand(3, 2, 5)
    losses = counterfactual_losses(params, batch, config, sample)
    assert losses.shape == (3, 2, 5, 4)
    for layer, row, position, expert in itertools.product(range(3), range(2), range(5), range(4)):
        loss = losses[layer, row, position, expert]
        if batch.labels[row, position] == IGNORE_INDEX:
            assert loss == torch.inf
        elif batch.attention_mask[row, position]:
            wanted = by_whole_passes(params, batch, config, layer, 5 * row + position, expert)
            assert float(loss) == pytest.approx(wanted, rel=1e-10)


def test_documents_in_a_row_stay_apart_in_forks_too() -> None:
    config = tiny_config()
    params, plain = spread_params(config, 1), tiny_batch(config, 1, 6)
    packed = plain._replace(attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2]]))
    second = Batch(*(part[:, 3:] for part in plain))
    sample = torch.arange(6).expand(2, 1, 6)
    second_losses = counterfactual_losses(params, packed, config, sample)[:, :, 3:]
    torch.testing.assert_close(second_losses, counterfactual_losses(params, second, config, sample[..., :3]))


def test_a_sample_is_of_targets_without_repetition_and_differs_by_layer_and_step() -> None:
    labels = torch.full((3, 40), 1)
    labels[:, ::2] = IGNORE_INDEX
    samples = [draw_sample(labels, 2, 8, 5, torch.tensor(step)) for step in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0][0], samples[0][1])
    assert (labels.expand(2, 3, 40).gather(-1, samples[0]) != IGNORE_INDEX).all()
    assert all(len(set(row.tolist())) == 8 for row in samples[0].flatten(0, 1))


def test_sampled_values_stand_at_their_tokens_and_all_others_are_infinite() -> None:
    values, sample = torch.rand(2, 3, 2, 4), torch.tensor([[[0, 3]] * 3, [[4, 1]] * 3])
    dense = fill_sampled(values, sample, 5).view(2, 3, 5, 4)
    for layer, row in itertools.product(range(2), range(3)):
        for pick, position in enumerate(sample[layer, row].tolist()):
            assert torch.equal(dense[layer, row, position], values[layer, row, pick])
    assert dense.isfinite().sum() == values.numel()


def test_the_oracle_as_a_rule_teaches_the_expert_of_the_least_own_loss() -> None:
    config = tiny_config(num_experts_per_tok=2)
    params, batch = spread_params(config, 2), tiny_batch(config, 3, 7)
    surprise = per_token_surprise(params, batch, config, HyperParams(), kind="oracle")
    known = surprise.isfinite().all(dim=-1)
    assert torch.equal(known, surprise.isfinite().any(dim=-1)), "all experts or none"
    assert (known.view(2, 3, 7).sum(dim=-1) == PICKS).all()
    layer, token = (int(index) for index in known.nonzero()[0])
    wanted = [by_whole_passes(params, batch, config, layer, token, expert) for expert in range(4)]
    assert surprise[layer, token].tolist() == pytest.approx(wanted)


def test_the_oracle_as_a_rule_trains_and_maps() -> None:
    config = tiny_config(num_experts_per_tok=2)
    batch = tiny_batch(config, 3, 7)
    states = [init_state(config, torch.Generator().manual_seed(seed)) for seed in range(2)]
    hyper = HyperParams(explore_seed=3)
    mapped, metrics = vmap(lambda run: hyper_step(run, batch, hyper, config, kind="oracle"))(stack(states))
    for index, state in enumerate(states):
        alone, own = hyper_step(state, batch, hyper, config, kind="oracle")
        torch.testing.assert_close(metrics.surprise[index], own.surprise, rtol=2e-4, atol=2e-4)
        router, wanted = (s.params["layers"]["moe"]["router"] for s in (unstack(mapped)[index], alone))
        torch.testing.assert_close(router, wanted, rtol=2e-4, atol=2e-4)
        assert (wanted != state.params["layers"]["moe"]["router"]).any()


def test_regret_is_zero_at_the_best_expert_and_the_difference_elsewhere() -> None:
    losses = torch.tensor([[2.0, 1.5, 4.0], [1.0, 1.0, 0.5]])
    assert regret(losses, torch.tensor([1, 2])).tolist() == [0.0, 0.0]
    assert regret(losses, torch.tensor([0, 1])).tolist() == [0.5, 0.5]


def test_regrets_by_hand() -> None:
    losses = torch.tensor([[[2.0, 1.0, 4.0], [1.0, 3.0, 0.5], [9.0, 9.0, 9.0]]])  # the last one is not kept
    ids = torch.tensor([[[0, 2], [1, 0], [0, 1]]])
    active = torch.tensor([[[True, True], [True, False], [True, True]]])
    values = torch.full((6, 1, 3, 3), torch.inf)
    values[:, 0, 0, 0], values[:, 0, 0, 2], values[:, 0, 1, 1] = 2.0, 1.0, 1.0
    facts = regret_facts(losses, values, ids, active, torch.tensor([[True, True, False]]))
    assert facts["regret"]["router"] == pytest.approx((1.0 + 2.5) / 2)
    assert facts["regret"]["random"] == pytest.approx((7 / 3 - 1 + 1.5 - 0.5) / 2, rel=1e-4)
    assert facts["regret"]["visited random"] == pytest.approx((2.0 + 2.5) / 2)
    assert facts["regret"]["visited best"] == pytest.approx((1.0 + 2.5) / 2)
    assert facts["regret"]["w2"] == pytest.approx((3.0 + 2.5) / 2)
    assert (facts["oracle_hits"], facts["oracle_chance"]) == (0.0, pytest.approx(1 / 3))


def test_drift_is_the_share_of_real_tokens_with_another_first_choice() -> None:
    before, after = torch.tensor([[[0, 1, 2, -1]]]), torch.tensor([[[0, 3, 2, -1]]])
    assert drift(before, before).tolist() == [[0.0]]
    assert drift(before, after).tolist() == [[pytest.approx(1 / 3)]]


def test_co_activation_is_zero_by_chance_and_large_for_experts_that_always_meet() -> None:
    pairs = torch.tensor([[0, 1], [2, 3]] * 6)[None]
    always = co_activation_facts(pairs, torch.ones_like(pairs, dtype=torch.bool), 4)
    every = torch.tensor(list(itertools.combinations(range(4), 2)) * 2)[None]
    chance = co_activation_facts(every, torch.ones_like(every, dtype=torch.bool), 4)
    assert chance["co_activation"] == pytest.approx(0.0, abs=1e-9)
    assert always["co_activation"] == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-4)
    assert always["co_activation_cosine"][0][0] == [1.0, 1.0, 0.0, 0.0]
    lone = torch.zeros(1, 5, 1, dtype=torch.int64)
    assert co_activation_facts(lone, torch.ones_like(lone, dtype=torch.bool), 4)["co_activation"] is None
