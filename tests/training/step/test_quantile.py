"""Quantile balancing against its definition by loops, and what it does to the load."""

import numpy as np
import pytest
import torch
from torch.func import vmap

from tests.helpers import assert_close, assert_same_bits, seeded, spread_params, tiny_batch, tiny_config
from tiny_onn_func import ModelConfig, forward
from tiny_onn_func.tree import flatten, stack, unstack
from training import HyperParams, TrainState, hyper_step, state_of
from training.errors import UserError
from training.run.config import DEFAULT_MODEL, RunConfig
from training.step.accumulate import accumulated_step
from training.step.router_state import quantile_bias

FIXED = tiny_config(num_experts_per_tok=2)
BATCH = dict(batch=4, seq=9, left=(0, 2), right=(3,))
QUIET = HyperParams(lr=0.0, router_lr=0.0, surprise_weight=0.0, quantile_balance=1.0)


def a_state(config: ModelConfig, seed: int = 0) -> TrainState:
    return state_of(spread_params(config, seed, router_gain=20.0), config)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_bias_is_the_quantile_of_what_each_token_asks_for(gate: str) -> None:
    config = tiny_config(num_experts_per_tok=2, gate=gate)
    params, batch = spread_params(config, 1), tiny_batch(config, **BATCH)
    bias = params["layers"]["moe"]["router_bias"]
    bias += 0.1 * torch.randn(bias.shape, generator=seeded(0), dtype=bias.dtype)
    trace = forward(params, batch.input_ids, config, attention_mask=batch.attention_mask)[1]
    real = batch.attention_mask.flatten() != 0
    new = quantile_bias(trace, bias, real, 0.0, config)
    for layer in range(2):
        raw = trace.router_inputs[layer] @ params["layers"]["moe"]["router"][layer]
        scores = raw.sigmoid() if gate == "sigmoid" else raw.softmax(-1)
        wanted = []
        for expert in range(4):
            asked = []
            for token in real.nonzero().flatten().tolist():
                ranked = sorted((scores[token] + bias[layer]).tolist(), reverse=True)
                asked.append(ranked[2] - float(scores[token, expert]))  # the best of those that are not visited
            wanted.append(np.quantile(asked, 2 / 4))
        assert_close(new[layer], torch.tensor(wanted) - np.mean(wanted), 1e-9)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_load_becomes_even_on_the_batch_that_was_balanced_and_stays_uneven_without(gate: str) -> None:
    config = tiny_config(num_experts_per_tok=2, gate=gate)
    batch = tiny_batch(config, batch=16, seq=12)

    def last_vio(hyper: HyperParams) -> float:
        state = a_state(config)
        for _ in range(12):
            state, metrics = hyper_step(state, batch, hyper, config)
        return float(metrics.max_vio)

    assert last_vio(QUIET._replace(quantile_balance=0.5)) < 0.2
    assert last_vio(QUIET._replace(quantile_balance=0.0)) > 0.4, "twin"


def test_thresholds_follow_the_quantile_of_the_logits_and_learn_nothing_else() -> None:
    config = tiny_config(routing="thresholds", num_experts=8)
    hyper = QUIET._replace(quantile_balance=0.2, quantile_k=3.0, router_coupling=1.0)
    state, batch = a_state(config), tiny_batch(config, batch=16, seq=12)
    for _ in range(40):
        before = state
        state, metrics = hyper_step(state, batch, hyper, config)
    logits = forward(before.params, batch.input_ids, config)[1].router_logits
    old, new = (s.params["layers"]["moe"]["router_bias"] for s in (before, state))
    wanted = -np.quantile(logits.numpy(), 1 - 3 / 8, axis=1)
    assert_close(new, old + 0.2 * (torch.from_numpy(wanted) - old), 1e-9)
    assert 2.7 < float(metrics.avg_k) < 3.6  # a token above no threshold visits one expert all the same
    assert float(metrics.max_vio) < 0.3


def test_runs_with_and_without_quantiles_are_mapped_together() -> None:
    batch, shares = tiny_batch(FIXED, **BATCH), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    aims = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    hyper = HyperParams(bias_speed=0.01)
    step = lambda state, share, k: hyper_step(  # noqa: E731
        state, batch, hyper._replace(quantile_balance=share, quantile_k=k), FIXED
    )[0]
    mapped = vmap(step)(stack([a_state(FIXED)] * 3), shares, aims)
    for run, share, k in zip(unstack(mapped), shares, aims, strict=True):
        alone = step(a_state(FIXED), float(share), float(k))
        assert_close(run.params["layers"]["moe"]["router_bias"], alone.params["layers"]["moe"]["router_bias"], 1e-9)


def test_the_bias_of_a_step_in_parts_is_the_mean_of_its_parts() -> None:
    batch = tiny_batch(FIXED, **BATCH)
    parts = [type(batch)(*(t[at : at + 2] for t in batch)) for at in (0, 2)]
    counts = [int(part.attention_mask.sum()) for part in parts]
    biases = [
        hyper_step(a_state(FIXED), part, QUIET, FIXED)[0].params["layers"]["moe"]["router_bias"] for part in parts
    ]
    together = accumulated_step(a_state(FIXED), batch, QUIET, FIXED, parts=2)[0].params["layers"]["moe"]["router_bias"]
    assert_close(together, sum(n * b for n, b in zip(counts, biases, strict=True)) / sum(counts), 1e-9)


def test_a_batch_of_padding_and_a_model_that_visits_all_experts_leave_a_finite_bias() -> None:
    padding = tiny_batch(FIXED, batch=2, seq=3, left=(3, 3))
    state = a_state(FIXED)
    after = hyper_step(state, padding, QUIET, FIXED)[0]
    assert_same_bits(after.params["layers"]["moe"]["router_bias"], state.params["layers"]["moe"]["router_bias"])
    config = tiny_config(num_experts_per_tok=4)
    after = hyper_step(a_state(config), tiny_batch(config), QUIET, config)[0]
    assert all(leaf.isfinite().all() for leaf in flatten(after.params).values())


def test_thresholds_without_an_aim_are_refused_by_the_key() -> None:
    model = type(DEFAULT_MODEL)(**(vars(DEFAULT_MODEL) | {"routing": "thresholds", "num_experts_per_tok": -1}))
    with pytest.raises(UserError, match=r"hyper\.quantile_k: expected more than 0"):
        RunConfig(model=model, hyper=HyperParams(quantile_balance=0.01))
