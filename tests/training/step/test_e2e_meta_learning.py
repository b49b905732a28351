"""Both systems learn, each at its own speed, on a text that every Python has."""

import argparse
import inspect
import math
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers import assert_same_bits, seeded, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import flatten, partition
from training import Batch, HyperParams, Metrics, TrainState, hyper_step, init_state

TEXT = inspect.getsource(argparse).encode()[:1024]
LANGUAGE = ModelConfig(
    vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    moe_intermediate_size=32, num_experts=4,
)  # fmt: skip


class Run(NamedTuple):
    before: TrainState
    after: TrainState
    metrics: list[Metrics]

    def series(self, name: str) -> list[float]:
        return [float(getattr(m, name)) for m in self.metrics]


def train(config: ModelConfig, hyper: HyperParams, batches: list[Batch], seed: int = 0) -> Run:
    before = state = init_state(config, seeded(seed))
    measured = []
    for batch in batches:
        state, metrics = hyper_step(state, batch, hyper, config)
        measured.append(metrics)
    return Run(before, state, measured)


def windows(count: int, rows: int = 8, seq: int = 32) -> list[Batch]:
    """Batches of windows that begin anywhere in the text."""
    tokens = torch.tensor(list(TEXT))
    starts = torch.randint(len(TEXT) - seq, (count, rows, 1), generator=seeded(0))
    cut = tokens[starts + torch.arange(seq + 1)]
    return [Batch(piece[:, :-1], piece[:, 1:], torch.ones(rows, seq, dtype=torch.int64)) for piece in cut]


def unigram_entropy() -> float:
    """Nats of the best model that reads no context."""
    return -sum(n / len(TEXT) * math.log(n / len(TEXT)) for n in Counter(TEXT).values())


@cache
def language_run() -> Run:
    return train(LANGUAGE, HyperParams(lr=1e-2), windows(100))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_main_loss_falls_well_below_the_entropy_of_single_bytes() -> None:
    losses = language_run().series("main_loss")
    assert losses[0] == pytest.approx(math.log(257), abs=0.1)  # a fresh model knows nothing
    assert mean(losses[-10:]) < unigram_entropy() - 0.5, f"{mean(losses[-10:]):.2f} of {unigram_entropy():.2f} nats"


def test_both_systems_move_while_the_text_is_learned() -> None:
    run = language_run()
    for name, leaf in flatten(run.before.params).items():
        same = torch.equal(leaf, flatten(run.after.params)[name])
        assert same is (name == "layers.moe.router_bias"), name
    assert mean(run.series("router_loss")[-10:]) < run.series("router_loss")[0]


# --- a setting where the router must succeed: one batch, frozen experts, a fixed number of candidates -----------------

ROUTING = tiny_config(num_hidden_layers=1, num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=8)
FROZEN_EXPERTS = HyperParams(lr=0.0, router_lr=3e-2, weight_decay=0.0)


@cache
def router_run(**changes: Any) -> Run:
    return train(ROUTING, FROZEN_EXPERTS._replace(**changes), [tiny_batch(ROUTING, 4, 8, right=(0, 3))] * 40)


def test_a_router_that_follows_the_most_surprised_expert_hits_its_targets() -> None:
    """A larger weight makes the chosen expert more surprised: targets stand still and can be learned to the end."""
    run = router_run(surprise_sign=-1.0)
    accuracy, loss = run.series("gating_acc"), run.series("router_loss")
    assert accuracy[0] < 0.8
    assert mean(accuracy[-5:]) > 0.95
    assert mean(loss[-5:]) < loss[0] / 4
    assert run.series("gating_trivial") == [0.5] * 40


def test_a_router_that_follows_the_least_surprised_expert_evens_surprise_out() -> None:
    """A larger weight makes the chosen expert less of a target: the loss falls to a coin's toss between candidates."""
    run = router_run()
    loss = run.series("router_loss")
    assert loss[0] == pytest.approx(math.log(4), abs=0.2)
    assert mean(loss[-5:]) < loss[0] * 0.75
    assert mean(loss[-5:]) < math.log(2) + 0.2
    assert mean(run.series("gating_acc")[-5:]) < 0.8


def test_with_a_router_lr_of_zero_the_router_keeps_its_bits_while_the_experts_learn() -> None:
    run = train(ROUTING, HyperParams(lr=1e-2, router_lr=0.0), [tiny_batch(ROUTING)] * 5)
    _, router_before = partition(run.before.params)
    _, router_after = partition(run.after.params)
    assert_same_bits(router_after, router_before, "router")
    assert run.series("main_loss")[-1] < run.series("main_loss")[0]
    assert min(run.series("router_grad_norm")) > 0  # it was asked to move


def test_with_an_lr_of_zero_the_experts_keep_their_bits_while_the_router_learns() -> None:
    run = router_run()
    fast_before, router_before = partition(run.before.params)
    fast_after, router_after = partition(run.after.params)
    assert_same_bits(fast_after, fast_before, "fast")
    assert not torch.equal(router_after["layers"]["moe"]["router"], router_before["layers"]["moe"]["router"])
    assert min(run.series("grad_norm")) > 0


def test_neither_system_feels_the_other_ones_speed_within_a_step() -> None:
    batch = [tiny_batch(ROUTING)]
    slow = train(ROUTING, HyperParams(lr=1e-3, router_lr=1e-3), batch)
    fast_router = train(ROUTING, HyperParams(lr=1e-3, router_lr=1e-1), batch)
    fast_experts = train(ROUTING, HyperParams(lr=1e-1, router_lr=1e-3), batch)
    (experts, router), (experts_2, router_2), (experts_3, router_3) = (
        partition(run.after.params) for run in (slow, fast_router, fast_experts)
    )
    assert_same_bits(experts_2, experts, "experts beside a fast router")
    assert_same_bits(router_3, router, "router beside fast experts")
    assert not torch.equal(router_2["layers"]["moe"]["router"], router["layers"]["moe"]["router"])
    assert not torch.equal(experts_3["layers"]["moe"]["w2"], experts["layers"]["moe"]["w2"])
