"""Hash routing: its keys, its learned weights and its layers, against their definitions by loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from tests.helpers import assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.config import HASH_KEYS
from tiny_onn_func.hashing import hash_keys, hash_logits, mix
from training import HyperParams, hyper_step, init_state

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=2, max_size=2)


@given(documents=ROWS, seed=st.integers(0, 99))
def test_every_key_equals_its_definition_by_loops(documents: list[list[int]], seed: int) -> None:
    ids = torch.randint(13, (2, 6), generator=seeded(seed))
    mask = torch.tensor(documents)
    keys = {kind: hash_keys(ids, mask, kind) for kind in HASH_KEYS}
    for row in range(2):
        place = 0
        for at in range(6):
            same = at > 0 and documents[row][at] == documents[row][at - 1]
            place = place + 1 if same else 0
            previous = int(ids[row, at - 1]) if same else -1
            assert int(keys["table"][row, at]) == int(ids[row, at])
            assert int(keys["token"][row, at]) == int(ids[row, at])
            assert int(keys["previous"][row, at]) == previous
            assert int(keys["position"][row, at]) == place
            assert int(keys["pair"][row, at]) == int(mix(torch.tensor(previous))) + int(ids[row, at])
    for kind in HASH_KEYS:
        assert torch.equal(vmap(lambda i, m, kind=kind: hash_keys(i[None], m[None], kind)[0])(ids, mask), keys[kind])


@pytest.mark.parametrize("kind", [kind for kind in HASH_KEYS if kind != "table"])  # which is empty here
def test_tokens_of_one_key_visit_the_same_experts_and_tokens_of_several_others(kind: str) -> None:
    config = tiny_config(num_experts_per_tok=2, routing="hash", hash_key=kind)
    batch = tiny_batch(config, 4, 9)
    keys = hash_keys(batch.input_ids, None, config.hash_key).flatten()
    routes = [forward(spread_params(config, seed), batch.input_ids, config)[1].expert_ids for seed in (0, 1)]
    assert torch.equal(*routes), "no parameter decides"
    for key in keys.unique():
        assert (routes[0][:, keys == key] == routes[0][:, keys == key][:, :1]).all()
    assert (routes[0][0] != routes[0][0, :1]).any()


def test_a_pair_is_no_sum_of_its_tokens() -> None:
    pairs = [(a, b) for a in range(40) for b in range(40)]
    keys = hash_keys(torch.tensor(pairs), None, "pair")[:, 1]
    assert len(keys.unique()) == len(pairs)


def test_learned_weights_are_the_routers_softmax_over_the_experts_that_the_hash_chose() -> None:
    config = tiny_config(num_experts_per_tok=2, routing="hash", hash_weights="router")
    params, batch = spread_params(config, 2), tiny_batch(config, 3, 5)
    params["layers"]["moe"]["router_bias"] += torch.randn(2, 4, generator=seeded(0))
    trace = forward(params, batch.input_ids, config)[1]
    fixed = forward(params, batch.input_ids, tiny_config(num_experts_per_tok=2, routing="hash"))[1]
    assert torch.equal(trace.expert_ids, fixed.expert_ids), "neither router nor bias choose"
    for layer in range(2):
        hashed = hash_logits(batch.input_ids.flatten(), layer, 4)
        for token in range(15):
            logits = trace.router_inputs[layer, token] @ params["layers"]["moe"]["router"][layer]
            assert_close(trace.router_logits[layer, token], logits, 1e-12)
            chosen = trace.expert_ids[layer, token].tolist()
            assert chosen == hashed[token].argsort(descending=True)[:2].tolist()
            assert_close(trace.weights[layer, token], logits[chosen].softmax(0), 1e-12)
    assert (trace.weights - fixed.weights).abs().max() > 0.1


def moved(config: ModelConfig, **numbers: float) -> list[bool]:
    """Layer by layer: the router moved in a step."""
    state = init_state(config, seeded(0))
    after, _ = hyper_step(state, tiny_batch(config, 3, 6), HyperParams(**numbers), config)
    old, new = (s.params["layers"]["moe"]["router"] for s in (state, after))
    return [not torch.equal(a, b) for a, b in zip(old, new, strict=True)]


@pytest.mark.parametrize("teacher", ["surprise", "main loss"])
def test_learned_weights_learn_from_surprise_and_from_the_main_loss(teacher: str) -> None:
    config = tiny_config(num_experts_per_tok=2, routing="hash", hash_weights="router")
    numbers = {"surprise": dict(), "main loss": dict(router_coupling=1.0, surprise_weight=0.0)}
    assert moved(config, **numbers[teacher]) == [True, True]
    assert moved(config, surprise_weight=0.0) == [False, False], "twin: nobody teaches"
    assert moved(tiny_config(num_experts_per_tok=2, routing="hash"), **numbers[teacher]) == [False, False], "twin"


@pytest.mark.parametrize("named", ["0", "2", "0,2"])
def test_a_hash_routes_the_named_layers_and_the_router_of_the_others_learns(named: str) -> None:
    sizes = dict(num_experts_per_tok=2, num_hidden_layers=3)
    config = tiny_config(routing="hash", hash_layers=named, **sizes)
    hashed = [layer in map(int, named.split(",")) for layer in range(3)]
    params, batch = spread_params(config, 1), tiny_batch(config, 4, 9)
    ids, trace = batch.input_ids.flatten(), forward(params, batch.input_ids, config)[1]
    for layer, is_hashed in enumerate(hashed):
        routes = trace.expert_ids[layer]
        same = all(bool((routes[ids == token] == routes[ids == token][:1]).all()) for token in ids.unique())
        assert same == is_hashed
    assert moved(config, router_coupling=0.5) == [not is_hashed for is_hashed in hashed]


def test_a_layer_without_hash_is_that_of_a_model_without_hash() -> None:
    sizes = dict(num_experts_per_tok=2, num_hidden_layers=3)
    params, batch = spread_params(tiny_config(**sizes), 1), tiny_batch(tiny_config(), 4, 9)
    mixed = forward(params, batch.input_ids, tiny_config(routing="hash", hash_layers="2", **sizes))[1]
    plain = forward(params, batch.input_ids, tiny_config(**sizes))[1]
    for part, other in zip(mixed, plain, strict=True):
        assert_same_bits(part[:2], other[:2])


BAD = [
    (dict(hash_layers="0,5"), "model.hash_layers: expected all, or numbers below 2 with commas between, got '0,5'"),
    (dict(hash_layers=""), "model.hash_layers"),
    (dict(hash_layers="0,0"), "model.hash_layers"),
    (dict(hash_layers="-1"), "model.hash_layers"),
    (dict(routing="router", hash_key="pair"), "model.hash_key: expected token without routing: hash, got pair"),
    (dict(routing="token", hash_weights="router"), "model.hash_weights: expected hash without routing: hash"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=str)
def test_a_hash_that_cannot_be_is_refused_by_its_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        tiny_config(**{"routing": "hash", **changes})
