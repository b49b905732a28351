"""Tables by token: balanced by frequency, and counted from a router's choices (StableMoE)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.hashing import hash_logits
from training import HyperParams, TrainState, hyper_step, state_of
from training.data.token_table import balanced_table

TABLE = tiny_config(num_experts_per_tok=2, routing="hash", hash_key="table")
STABLE = tiny_config(num_experts_per_tok=2, routing="stable")


@given(counts=st.lists(st.integers(0, 50), min_size=13, max_size=13))
def test_a_balanced_table_equals_its_definition_by_loops(counts: list[int]) -> None:
    table = balanced_table(np.array(counts), TABLE)
    for layer in range(2):
        rows = [0, 0, 0, 0]
        hashed = hash_logits(torch.arange(13), layer, 4)
        for token in sorted(range(13), key=lambda v: -counts[v]):
            chosen = sorted(range(4), key=lambda e, v=token: (rows[e], -float(hashed[v, e])))[:2]
            for expert in range(4):
                wanted = hashed[token, expert] + (1 if expert in chosen else 0)
                assert float(table[layer, token, expert]) == float(wanted)
            for expert in chosen:
                rows[expert] += counts[token]


def test_a_balanced_table_evens_out_what_a_hash_leaves_uneven() -> None:
    config = ModelConfig(257, 8, 2, 2, 1, 4, 6, 16, num_experts_per_tok=4, routing="hash", hash_key="table")
    counts = (10_000 / (1 + np.arange(257))).astype(np.int64)  # Zipf

    def spread(scores: torch.Tensor) -> float:
        load = np.zeros(16)
        for token, row in enumerate(scores):
            load[row.topk(4).indices.numpy()] += counts[token]
        return float(load.max() / load.mean()) - 1

    table = balanced_table(counts, config)
    assert (table[0] != table[1]).any(), "layers differ"
    for layer in range(2):
        assert spread(table[layer]) < 0.05
        assert spread(hash_logits(torch.arange(257), layer, 16)) > 0.15, "twin"


def test_a_table_chooses_and_nothing_moves_it() -> None:
    params = spread_params(TABLE, 1)
    table = torch.rand(2, 13, 4, generator=seeded(0), dtype=torch.float64)
    params["layers"]["moe"]["token_table"] = table
    batch = tiny_batch(TABLE, 3, 6)
    trace = forward(params, batch.input_ids, TABLE)[1]
    for layer in range(2):
        for token, visited in zip(batch.input_ids.flatten().tolist(), trace.expert_ids[layer], strict=True):
            assert visited.tolist() == table[layer, token].argsort(descending=True)[:2].tolist()
    hyper = HyperParams(router_coupling=1.0, bias_speed=0.1, weight_decay=0.5, balance_weight=1.0)
    after, _ = hyper_step(state_of(params, TABLE), batch, hyper, TABLE)
    assert_same_bits(after.params["layers"]["moe"]["token_table"], table)


def test_a_table_without_a_fixed_k_is_refused_by_the_key() -> None:
    with pytest.raises(
        ValueError, match=r"model\.num_experts_per_tok: expected a fixed K with hash_key: table, got -1"
    ):
        balanced_table(np.ones(13, np.int64), tiny_config(routing="hash", hash_key="table"))


def steps(hyper: HyperParams, count: int) -> list[TrainState]:
    states = [state_of(spread_params(STABLE, 2, router_gain=5.0), STABLE)]
    for step in range(count):
        states.append(hyper_step(states[-1], tiny_batch(STABLE, 4, 8, step, right=(3,)), hyper, STABLE)[0])
    return states


HYPER = HyperParams(lr=0.02, router_lr=0.02, router_coupling=1.0, surprise_weight=0.0, table_step=3, table_memory=0.9)


def test_the_table_counts_the_visits_of_each_token_until_it_chooses() -> None:
    wanted = torch.zeros(2, 13, 4, dtype=torch.float64)
    states = steps(HYPER, 5)
    for step, state in enumerate(states[:3]):
        batch = tiny_batch(STABLE, 4, 8, step, right=(3,))
        trace = forward(state.params, batch.input_ids, STABLE, attention_mask=batch.attention_mask)[1]
        wanted *= 0.9
        for layer, token, slot in trace.active.nonzero().tolist():
            wanted[layer, batch.input_ids.flatten()[token], trace.expert_ids[layer, token, slot]] += 1
        torch.testing.assert_close(states[step + 1].params["layers"]["moe"]["token_table"], wanted)
    for state in states[3:]:
        torch.testing.assert_close(state.params["layers"]["moe"]["token_table"], wanted)
    assert [bool((s.params["layers"]["moe"]["table_on"] > 0).all()) for s in states] == [False] * 3 + [True] * 3


def test_a_token_visits_the_same_experts_from_then_on_while_its_weights_go_on_learning() -> None:
    states, batch = steps(HYPER, 6), tiny_batch(STABLE, 6, 9, 7)
    ids = batch.input_ids.flatten()

    def routes(state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
        trace = forward(state.params, batch.input_ids, STABLE)[1]
        return trace.expert_ids.sort(dim=-1).values, trace.weights

    before, (then, weights), (later, later_weights) = (routes(states[at]) for at in (2, 3, 6))
    same = lambda ways: all(bool((ways[:, ids == v] == ways[:, ids == v][:, :1]).all()) for v in ids.unique())  # noqa: E731
    assert not same(before[0]), "the router decides"
    assert same(then)
    assert torch.equal(then, later)
    assert (weights - later_weights).abs().max() > 1e-4
    table = states[3].params["layers"]["moe"]["token_table"]
    for layer in range(2):
        for token, visited in zip(ids.tolist(), then[layer], strict=True):
            if table[layer, token].sum() > 0:
                assert table[layer, token][visited].min() >= table[layer, token].sort().values[2]


def test_a_table_that_never_chooses_leaves_the_run_as_it_is_without() -> None:
    plain = tiny_config(num_experts_per_tok=2)
    params = spread_params(plain, 2, router_gain=5.0)
    state, stable = state_of(params, plain), steps(HYPER._replace(table_step=0), 3)[-1]
    for step in range(3):
        state = hyper_step(state, tiny_batch(STABLE, 4, 8, step, right=(3,)), HYPER, plain)[0]
    for name in ("router", "w2"):
        torch.testing.assert_close(stable.params["layers"]["moe"][name], state.params["layers"]["moe"][name])
