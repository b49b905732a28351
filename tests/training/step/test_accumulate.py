"""The step of a batch in parts is the step of the whole batch, whatever the router's rule."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from tests.helpers import assert_close, assert_same_bits, example, spread_params, tiny_batch, tiny_config
from tests.training.step.test_hyper_step import HYPER, as_double
from tiny_onn_func import ModelConfig
from tiny_onn_func.tree import leaves, partition, stack, tree_map, walk
from training import Batch, HyperParams, Rule, TrainState, hyper_step, init_state
from training.step.accumulate import accumulated_step
from training.step.compile import trace_step
from training.step.hyper_step import run_pass
from training.step.main_pass import WHOLE, BatchShard, StepOptions
from training.step.rules import LEAST_SURPRISE, Targets

FIXED, DYNAMIC = tiny_config(num_experts_per_tok=3), tiny_config()
EXACT, SINGLE, COUNTED = 1e-12, 2e-5, 3e-7  # relative: float64, float32, metrics that are counted in float32
ROWS, STEPS = 6, 3
OWN_RULE = example("average_surprise_of_a_token").RULE
CASES: dict[str, tuple[ModelConfig, HyperParams, dict[str, Any]]] = {
    "router": (FIXED, HYPER, {}),
    "router by token": (tiny_config(num_experts_per_tok=2, routing="token"), HYPER, {}),
    "hash": (tiny_config(num_experts_per_tok=2, routing="hash"), HYPER, {}),
    "thresholds": (tiny_config(routing="thresholds"), HYPER._replace(bias_speed=0.0, router_coupling=1.0), {}),
    "dynamic K": (DYNAMIC, HYPER._replace(pi_alpha=0.4), {}),
    "no guards": (FIXED, HyperParams(lr=0.02, router_lr=0.03), {}),
    "coupling": (FIXED, HYPER._replace(router_coupling=0.6), {}),
    "exploration": (DYNAMIC, HYPER._replace(explore_prob=0.4, pi_alpha=0.4), {}),
    "experts": (FIXED, HYPER, {"kind": "experts"}),
    "input": (FIXED, HYPER, {"kind": "input"}),
    "benefit": (FIXED, HYPER, {"kind": "benefit"}),
    "unweighted": (FIXED, HYPER, {"kind": "unweighted"}),
    "soft targets": (FIXED, HYPER._replace(target_temperature=0.5, surprise_until=5), {}),
    "expert norm": (FIXED, HYPER._replace(expert_norm=1.0), {}),
    "shuffle": (FIXED, HYPER._replace(shuffle_targets=1), {}),
    "soft shuffle": (FIXED, HYPER._replace(shuffle_targets=1, target_temperature=0.5, expert_norm=0.5), {}),
    "regenerate": (FIXED, HYPER._replace(regenerate_below=0.9, beta2=0.5), {}),
    "own rule": (FIXED, HYPER, {"rule": OWN_RULE}),
}
RULES_OF_THE_WHOLE = ("expert norm", "shuffle", "soft shuffle", "own rule")


def a_state(config: ModelConfig, dtype: torch.dtype, rule: Rule = LEAST_SURPRISE) -> TrainState:
    fresh = init_state(config, torch.Generator().manual_seed(0), rule)
    state = fresh._replace(params=spread_params(config, router_gain=3.0))
    if dtype == torch.float64:
        moments = [opt._replace(mu=as_double(opt.mu), nu=as_double(opt.nu)) for opt in (state[1], state[2])]
        return TrainState(state.params, *moments, state.step, tree_map(Tensor.double, state.rule))
    return state._replace(params=tree_map(lambda leaf: leaf.to(dtype), state.params))


def a_batch(seed: int, rows: int = ROWS) -> Batch:
    """Rows that differ in padding and in targets; the last one predicts nothing."""
    batch = tiny_batch(FIXED, rows, 6, seed, left=(0, 2, 4), right=(1,), unlabelled=0.3)
    labels = batch.labels.clone()
    labels[-1] = -100
    return batch._replace(labels=labels)


def steps_of(case: str, dtype: torch.dtype, parts: int | None) -> tuple[TrainState, list[Any]]:
    """Three steps, whole (None) or in parts: the state, and the metrics of each."""
    config, hyper, statics = CASES[case]
    state, measured = a_state(config, dtype, statics.get("rule", LEAST_SURPRISE)), []
    for number in range(STEPS):
        if parts is None:
            state, metrics = hyper_step(state, a_batch(number), hyper, config, **statics)
        else:
            state, metrics = accumulated_step(state, a_batch(number), hyper, config, parts=parts, **statics)
        measured.append(metrics)
    return state, measured


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_the_step_in_parts_is_the_step_of_the_whole_batch(case: str, parts: int) -> None:
    (state, measured), (whole, metrics) = steps_of(case, torch.float64, parts), steps_of(case, torch.float64, None)
    wanted = dict(walk(whole))
    assert dict(walk(state)).keys() == wanted.keys()
    for name, leaf in walk(state):
        root = Tensor.sqrt if ".nu." in name else Tensor.double  # a square's relative error is twice the gradient's
        assert leaf.dtype == wanted[name].dtype
        assert_close(root(leaf.double()), root(wanted[name].double()), EXACT, name)
    for mine, theirs in zip(measured, metrics, strict=True):
        for name, value in theirs._asdict().items():
            assert_close(getattr(mine, name).double(), value.double(), COUNTED, name)


@pytest.mark.parametrize("case", CASES)
def test_in_single_precision_one_step_differs_by_rounding_alone(case: str) -> None:
    config, hyper, statics = CASES[case]
    state, batch = a_state(config, torch.float32, statics.get("rule", LEAST_SURPRISE)), a_batch(0)
    whole, metrics = hyper_step(state, batch, hyper, config, **statics)
    ours, measured = accumulated_step(state, batch, hyper, config, parts=3, **statics)
    for (name, leaf), theirs in zip(walk(ours.expert_opt.mu), leaves(whole.expert_opt.mu), strict=True):
        assert_close(leaf, theirs, SINGLE, name)
    for (name, leaf), theirs in zip(walk(ours.router_opt.mu), leaves(whole.router_opt.mu), strict=True):
        assert_close(leaf, theirs, SINGLE, name)
    for name, value in metrics._asdict().items():
        assert_close(getattr(measured, name).double(), value.double(), SINGLE, name)


def test_one_part_has_the_bits_of_the_whole_step() -> None:
    assert_same_bits(steps_of("router", torch.float32, 1), steps_of("router", torch.float32, None))


@pytest.mark.parametrize("case", ["router", "exploration", *RULES_OF_THE_WHOLE])
def test_the_rules_that_compare_rows_would_ask_for_others_if_they_saw_a_part_alone(case: str) -> None:
    """The negative twin, and why the rule waits for all parts."""
    config, hyper, statics = CASES[case]
    rule = statics.get("rule", LEAST_SURPRISE)
    state, batch = a_state(config, torch.float64, rule), a_batch(0)
    fast, router = partition(state.params)

    def targets(shard: BatchShard, rows: slice) -> Targets:
        own = Batch(*(tensor[rows] for tensor in batch))
        return run_pass(state, fast, router, own, hyper, config, StepOptions(), rule, shard=shard).targets

    whole, *halves = targets(WHOLE, slice(0, 6)), *(targets(BatchShard(i, 2), slice(3 * i, 3 * i + 3)) for i in (0, 1))
    informative = torch.cat([half.informative for half in halves], dim=-1)
    assert torch.equal(informative, whole.informative)
    differ = torch.cat([half.expert for half in halves], dim=-1)[informative] != whole.expert[informative]
    assert bool(differ.any()) == (case in RULES_OF_THE_WHOLE)


def test_a_mean_of_the_parts_means_would_be_another_loss() -> None:
    """The negative twin: the parts differ in targets."""
    config, hyper, _ = CASES["router"]
    state, batch = a_state(config, torch.float64), a_batch(0)
    halves = [Batch(*(tensor[rows] for tensor in batch)) for rows in (slice(0, 3), slice(3, 6))]
    means = [hyper_step(state, half, hyper, config)[1].main_loss for half in halves]
    whole = accumulated_step(state, batch, hyper, config, parts=2)[1].main_loss
    assert float(abs(whole - sum(means) / 2)) > 1e-3


def test_a_teacher_is_heard_in_parts() -> None:
    config, hyper = FIXED, HYPER._replace(distill_alpha=0.5, distill_temperature=2.0)
    state, batch = a_state(config, torch.float64), a_batch(0)
    logits = torch.randn(ROWS, 6, config.vocab_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, metrics = hyper_step(state, batch, hyper, config, teacher_logits=logits)
    ours, measured = accumulated_step(state, batch, hyper, config, parts=3, teacher_logits=logits)
    for (name, leaf), theirs in zip(walk(ours.params), leaves(whole.params), strict=True):
        assert_close(leaf, theirs, EXACT, name)
    assert_close(measured.distill_loss, metrics.distill_loss, EXACT)


@pytest.mark.parametrize("case", ["router", "exploration", "soft shuffle", "own rule"])
def test_mapped_steps_in_parts_are_the_steps_one_by_one(case: str) -> None:
    config, hyper, statics = CASES[case]
    single = a_state(config, torch.float64, statics.get("rule", LEAST_SURPRISE))
    states = [single, single._replace(params=tree_map(lambda leaf: leaf * 1.1, single.params))]
    rates, batch = torch.tensor([0.01, 0.02], dtype=torch.float64), a_batch(0)

    def step(state: TrainState, rate: Tensor) -> Any:
        return accumulated_step(state, batch, hyper._replace(router_lr=rate), config, parts=2, **statics)

    mapped = vmap(step)(stack(states), rates)
    alone = stack([step(state, rate) for state, rate in zip(states, rates, strict=True)])
    for (name, leaf), theirs in zip(walk(mapped), leaves(alone), strict=True):
        assert_close(leaf.double(), theirs.double(), COUNTED, name)


def test_gradients_flow_through_a_step_in_parts() -> None:
    config, batch = FIXED, a_batch(0)
    state = a_state(config, torch.float64)

    def after(rate: Tensor, parts: int) -> Tensor:
        new, _ = accumulated_step(state, batch, HYPER._replace(lr=rate), config, parts=parts)
        return sum((leaf.square().sum() for leaf in leaves(new.params)), torch.zeros(()))

    rate = torch.tensor(0.01, dtype=torch.float64)
    assert_close(grad(after)(rate, 3), grad(after)(rate, 1), 1e-10)


def test_a_step_in_parts_can_be_traced_for_the_compiler() -> None:
    config = tiny_config(num_hidden_layers=1, num_experts_per_tok=2)
    state, batch = init_state(config, torch.Generator().manual_seed(0)), a_batch(0, 4)
    traced = trace_step(lambda state, batch: accumulated_step(state, batch, HYPER, config, parts=2), state, batch)
    other = a_batch(1, 4)
    ours, wanted = traced(state, other), accumulated_step(state, other, HYPER, config, parts=2)
    for (name, leaf), theirs in zip(walk(ours), leaves(wanted), strict=True):
        assert_close(leaf.double(), theirs.double(), SINGLE, name)


@pytest.mark.parametrize("parts", [0, 4, 5, 7])
def test_parts_that_do_not_divide_the_rows_are_refused(parts: int) -> None:
    config, hyper, _ = CASES["router"]
    with pytest.raises(ValueError, match=rf"parts: expected a divisor of the batch's rows \(6\), got {parts}; "):
        accumulated_step(a_state(config, torch.float64), a_batch(0), hyper, config, parts=parts)


def test_the_oracle_and_bad_numbers_are_refused() -> None:
    config, hyper, _ = CASES["router"]
    state = a_state(config, torch.float64)
    with pytest.raises(ValueError, match="kind: expected one without samples of the whole batch, got oracle; take 1"):
        accumulated_step(state, a_batch(0), hyper, config, parts=2, kind="oracle")
    with pytest.raises(ValueError, match=r"hyper\.lr: expected 0 or more, got -1"):
        accumulated_step(state, a_batch(0), hyper._replace(lr=-1), config, parts=2)


def test_a_step_in_parts_refuses_what_a_whole_one_refuses() -> None:
    config = tiny_config()
    state = init_state(config, torch.Generator().manual_seed(0))
    batch, hyper = tiny_batch(config, 4, 6, 0), HyperParams(balance_weight=torch.tensor([0.5, 0.5]))
    for step in (hyper_step, partial(accumulated_step, parts=2)):
        with pytest.raises(ValueError, match=r"hyper.balance_weight: "):
            step(state, batch, hyper, config)
