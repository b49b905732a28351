"""Rules of one's own, from outside: two examples do what they say, map, resume and run on many processes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from tests.helpers import ROOT, assert_close, assert_same_bits, example, spread_params, tiny_batch, tiny_config
from tiny_onn_func.tree import stack, unstack
from training import HyperParams, Rule, Targets, TrainState, hyper_step, init_state, per_token_surprise, state_of
from training.step.rules import LEAST_SURPRISE
from training.storage.checkpoint import load_state, named_tensors, open_checkpoint, save_checkpoint

CONFIG = tiny_config(num_experts_per_tok=3)
HYPER = HyperParams(router_lr=0.02)
NAMES = ("second_least_surprised", "average_surprise_of_a_token")


RULES = {name: example(name).RULE for name in NAMES}


BOTH_KINDS = pytest.mark.parametrize("takes_runs", [False, True])


def fresh(rule: Rule, seed: int = 0) -> TrainState:
    return init_state(CONFIG, torch.Generator().manual_seed(seed), rule=rule)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_is_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example(name).main()
    assert "step 9: loss" in capsys.readouterr().out
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 50


@given(st.integers(0, 99))
def test_the_second_least_surprised_expert_is_the_target(seed: int) -> None:
    batch = tiny_batch(CONFIG, 3, 6, seed, left=(2,), unlabelled=0.2)
    surprise = per_token_surprise(fresh(LEAST_SURPRISE, seed).params, batch, CONFIG, HYPER)
    _, targets = RULES[NAMES[0]].update((), surprise, None, batch, HYPER, torch.tensor(0))
    for layer, token in torch.cartesian_prod(torch.arange(2), torch.arange(18)).tolist():
        finite = [(float(v), e) for e, v in enumerate(surprise[layer, token]) if v.isfinite()]
        assert bool(targets.informative[layer, token]) == (len(finite) > 1)
        if len(finite) > 1:
            assert float(surprise[layer, token, targets.expert[layer, token]]) == sorted(finite)[1][0]


def test_the_average_over_a_tokens_past_visits_is_that_of_a_loop() -> None:
    rule, state, table = RULES[NAMES[1]], fresh(RULES[NAMES[1]]), {}
    for number in range(3):
        batch = tiny_batch(CONFIG, 3, 6, number, right=(1,))
        surprise = per_token_surprise(state.params, batch, CONFIG, HYPER)
        for layer, token, expert in surprise.isfinite().nonzero().tolist():
            key = layer, int(batch.input_ids.flatten()[token]), expert
            total, visits = table.get(key, (0.0, 0))
            table[key] = total + float(surprise[layer, token, expert]), visits + 1
        _, targets = rule.update(state.rule, surprise, None, batch, HYPER, state.step)
        for layer, token in targets.informative.nonzero().tolist():
            ident = int(batch.input_ids.flatten()[token])
            means = {
                e: table[layer, ident, e][0] / table[layer, ident, e][1] for e in range(4) if (layer, ident, e) in table
            }
            assert means[int(targets.expert[layer, token])] == pytest.approx(min(means.values()), rel=1e-5)
        state, _ = hyper_step(state, batch, HYPER, CONFIG, rule=rule)
    assert float(state.rule["visits"].sum()) == sum(visits for _, visits in table.values())


@pytest.mark.parametrize("name", NAMES)
def test_mapped_runs_of_a_rule_equal_single_runs(name: str) -> None:
    rule, batch = RULES[name], tiny_batch(CONFIG, 3, 6, left=(2,))
    states = [fresh(rule, seed) for seed in range(3)]
    rates = torch.tensor([0.01, 0.02, 0.03])

    def step(state: TrainState, rate: Tensor):
        return hyper_step(state, batch, HyperParams(router_lr=rate), CONFIG, rule=rule)

    mapped, metrics = vmap(step)(stack(states), rates)
    mapped, metrics = vmap(step)(mapped, rates)
    for run, (trained, rate) in enumerate(zip(unstack(mapped), rates.tolist(), strict=True)):
        alone, _ = step(states[run], rate)
        alone, measured = step(alone, rate)
        assert_close(metrics.router_loss[run], measured.router_loss, 1e-5)
        for a, b in ((trained.params["layers"]["moe"]["router"], alone.params["layers"]["moe"]["router"]),):
            assert_close(a, b, 1e-3)
        if trained.rule:
            assert torch.equal(trained.rule["visits"], alone.rule["visits"])
            assert_close(trained.rule["sum"], alone.rule["sum"], 1e-5)


def test_a_rules_state_is_checkpointed_and_a_resumed_run_has_the_bits_of_one_that_went_on(tmp_path) -> None:
    rule, batch = RULES[NAMES[1]], tiny_batch(CONFIG, 3, 6)
    state, _ = hyper_step(fresh(rule), batch, HYPER, CONFIG, rule=rule)
    tensors = named_tensors({"step": state.step, "state": state})
    save_checkpoint(tmp_path, tensors, vars(CONFIG), keep=1, tokenizer="bytes")
    loaded = load_state(open_checkpoint(tmp_path), {"step": state.step, "state": fresh(rule, 5)})["state"]
    assert_same_bits(loaded, state)
    assert_same_bits(*(hyper_step(s, batch, HYPER, CONFIG, rule=rule)[0] for s in (loaded, state)))


def test_the_shipped_rule_written_from_outside_makes_the_same_step() -> None:
    """The door is wide enough: mapped over runs, it is the rule that takes them all at once."""
    outside, batch = LEAST_SURPRISE._replace(takes_runs=False), tiny_batch(CONFIG, 3, 6, left=(2,))
    for state in (fresh(LEAST_SURPRISE), stack([fresh(LEAST_SURPRISE, seed) for seed in range(2)])):
        step = [
            lambda s, rule=rule: hyper_step(s, batch, HYPER, CONFIG, rule=rule) for rule in (LEAST_SURPRISE, outside)
        ]
        new_states = [(vmap(function) if state.step.ndim else function)(state) for function in step]
        assert_same_bits(new_states[1], new_states[0])


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda s, x, *_: (s, Targets(x.argmin(-1)[..., :-1], x.isfinite().any(-1))), "rule: expected expert of shape"),
        (lambda s, x, *_: ((x,), Targets(x.argmin(-1), x.isfinite().any(-1))), r"init's, \{\}, got \{'0': "),
    ],
)
@BOTH_KINDS
def test_a_rule_of_other_shapes_is_refused(update, message: str, takes_runs: bool) -> None:
    rule = Rule(lambda config: (), update, takes_runs)
    with pytest.raises(ValueError, match=message):
        hyper_step(fresh(rule), tiny_batch(CONFIG), HYPER, CONFIG, rule=rule)


WRONG: dict[str, tuple[Callable[..., Targets], str]] = {
    "informative of uint8": (
        lambda e, i, x: Targets(e, i.to(torch.uint8) * 255), "informative of torch.bool, got .*uint8",
    ),
    "ties that are counts": (lambda e, i, x: Targets(e, i, i.long() * 5), "tied of torch.bool, got torch.int64"),
    "experts of int32": (lambda e, i, x: Targets(e.int(), i), "expert of torch.int64, got torch.int32"),
    "shares of another precision": (
        lambda e, i, x: Targets(e, i, None, x.half()), "shares of torch.float.., got .*16",
    ),
    "shares of another shape": (lambda e, i, x: Targets(e, i, None, x[..., :-1]), "shares of shape"),
    "no expert": (lambda e, i, x: Targets(e + 4, i), "expert: expected 0 to 3, got"),
    "a negative expert": (lambda e, i, x: Targets(e - 4, i), "expert: expected 0 to 3, got -"),
}  # fmt: skip


def of_targets(targets: Callable[..., Targets], takes_runs: bool) -> Rule:
    return Rule(lambda _: (), lambda s, x, *_: (s, targets(x.argmin(-1), x.isfinite().any(-1), x)), takes_runs)


@BOTH_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_targets_of_another_dtype_or_range_are_refused(name: str, dtype: torch.dtype, takes_runs: bool) -> None:
    """In float32 by kernels, in float64 by the reference: the same line."""
    targets, message = WRONG[name]
    rule = of_targets(targets, takes_runs)
    state = state_of(spread_params(CONFIG, dtype=dtype), CONFIG, rule)
    with pytest.raises((ValueError, IndexError), match=f"^rule: (expected )?{message}"):
        hyper_step(state, tiny_batch(CONFIG), HYPER, CONFIG, rule=rule)


@BOTH_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_expert_of_a_token_that_does_not_teach_may_be_none(dtype: torch.dtype, takes_runs: bool) -> None:
    """The negative twin."""
    steps = []
    for nobody in (0, -1, 10**6):
        rule = of_targets(lambda e, i, x, nobody=nobody: Targets(torch.full_like(e, nobody), ~i), takes_runs)
        state = state_of(spread_params(CONFIG, dtype=dtype), CONFIG, rule)
        steps.append(hyper_step(state, tiny_batch(CONFIG), HYPER, CONFIG, rule=rule))
    assert_same_bits(steps[1], steps[0])
    assert_same_bits(steps[2], steps[0])
