"""The collapse alarm rings for each collapse, names what to change, and is silent otherwise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.report.alarms import MIN_RECORDS, WINDOW, Guards, collapse_alarms

E, L = 8, 2
EVEN = [[1 / E] * E] * L
ALONE = [[1.0] + [0.0] * (E - 1), [1 / E] * E]


def records(count: int = WINDOW, **fields: Any) -> list[dict[str, Any]]:
    healthy = {"avg_k": 3.0, "gating_acc": 0.4, "expert_load": EVEN}
    return [{"step": i + 1, **healthy, **fields} for i in range(count)]


def test_a_healthy_run_rings_no_alarm() -> None:
    assert collapse_alarms(records(200), E) == []


def test_fallen_k_rings_with_its_figures_and_says_that_perfect_gating_is_the_collapse() -> None:
    history = records(50, avg_k=7.1) + records(WINDOW, avg_k=1.07, gating_acc=0.99)
    (alarm,) = collapse_alarms(history, E)
    for part in (
        "7.10",
        "1.07",
        "0.99",
        "not success",
        "--model.min-experts-per-tok 2",
        "--hyper.pi-alpha 0.9 (it is 0.5)",
    ):
        assert part in alarm


def test_fallen_k_does_not_speak_of_success_where_gating_is_poor() -> None:
    (alarm,) = collapse_alarms(records(avg_k=1.0, gating_acc=0.2), E)
    assert "success" not in alarm


@pytest.mark.parametrize("sizes", [{"num_experts_per_tok": 1}, {"max_experts_per_tok": 1}])
def test_one_expert_per_token_is_no_alarm_where_it_was_asked_for(sizes: dict[str, int]) -> None:
    assert collapse_alarms(records(avg_k=1.0, gating_acc=1.0), E, **sizes) == []
    assert collapse_alarms(records(avg_k=1.0), E, num_experts_per_tok=2) != []


def test_dead_experts_are_those_without_a_row_in_the_whole_window() -> None:
    half = [[0.0] * 4 + [0.25] * 4, [1 / E] * E]
    other_half = [[0.25] * 4 + [0.0] * 4, [1 / E] * E]
    (alarm,) = collapse_alarms(records(expert_load=half), E)
    for part in ("4 of 16", "25%", "layer 0", "Set --hyper.balance-weight 1, or --hyper.bias-speed 0.01"):
        assert part in alarm
    alternating = [{**r, "expert_load": other_half} if i % 2 else r for i, r in enumerate(records(expert_load=half))]
    assert collapse_alarms(alternating, E) == []


DEAD = [[0.0] * 4 + [0.25] * 4, [1 / E] * E]


@pytest.mark.parametrize(
    ("guards", "wanted", "absent"),
    [
        (Guards(balance_weight=1.0), ["Set --hyper.bias-speed 0.01 ("], ["balance-weight"]),
        (Guards(balance_weight=0.01), ["Set --hyper.balance-weight 1 (it is 0.01), or --hyper.bias-speed 0.01"], []),
        (Guards(bias_speed=0.001), ["balance-weight 1,", "--hyper.bias-speed 0.01 (it is 0.001)"], []),
        (Guards(balance_weight=1.0, bias_speed=0.01), ["Set --hyper.explore-prob 0.05."], ["balance", "bias-speed"]),
        (
            Guards(router_lr=0.0),
            ["The router does not learn: set --hyper.router-lr 0.001 or --hyper.bias-s"],
            ["balance"],
        ),
        (Guards(freeze_step=10), ["does not learn after step 10: set --hyper.freeze-step higher, or 0"], ["balance"]),
        (
            Guards(0, 2.0, 0.1, 0.1),
            ["every setting that is known to help", "--model.num-experts"],
            ["Set ", "router-lr"],
        ),
    ],
)
def test_advice_is_what_the_run_does_not_have_yet(guards: Guards, wanted: list[str], absent: list[str]) -> None:
    (alarm,) = collapse_alarms(records(expert_load=DEAD), E, guards=guards)
    assert all(part in alarm for part in wanted)
    assert not any(part in alarm for part in absent)


def test_a_single_expert_is_widened_by_what_the_run_does_not_have_yet() -> None:
    (alarm,) = collapse_alarms(records(avg_k=1.0), E, guards=Guards(pi_alpha=0.3))
    assert "Set --model.min-experts-per-tok 2, or --hyper.pi-alpha 0.9 (it is 0.3)." in alarm
    (alarm,) = collapse_alarms(records(avg_k=1.0), E, guards=Guards(pi_alpha=0.95))
    assert alarm.endswith("Set --model.min-experts-per-tok 2.")
    assert "explore" not in alarm, "with 0.05 of it avg_k is 1.06: the alarm goes on"


def test_the_alarm_is_silent_during_the_warm_up_and_for_the_records_of_it() -> None:
    dead = records(80, expert_load=DEAD)
    assert collapse_alarms(dead[:50], E, guards=Guards(warmup_steps=50)) == []
    assert collapse_alarms(dead[: 50 + MIN_RECORDS - 1], E, guards=Guards(warmup_steps=50)) == []
    assert len(collapse_alarms(dead[: 50 + MIN_RECORDS], E, guards=Guards(warmup_steps=50))) == 1
    assert collapse_alarms(dead[:50] + records(80)[50:60], E, guards=Guards(warmup_steps=50)) == []


def test_one_dead_expert_of_many_is_no_alarm() -> None:
    load = [[0.0, *[1 / (E - 1)] * (E - 1)], [1 / E] * E]
    assert collapse_alarms(records(expert_load=load), E) == []


def test_an_expert_that_takes_a_layer_over_is_named() -> None:
    load = [[1 / E] * E, [0.006] * 3 + [0.958] + [0.006] * 4]
    (alarm,) = collapse_alarms(records(expert_load=load), E)
    for part in (
        "expert 3 of layer 1 gets 96% of the layer's visits (a fair share is 12%)",
        "--hyper.balance-weight 3,",
    ):
        assert part in alarm
    assert len(collapse_alarms(records(expert_load=ALONE), E)) == 2  # the others are dead, too


def test_an_expert_in_one_of_two_slots_of_every_token_takes_over_at_half_of_the_visits() -> None:
    load = [[0.48] + [0.52 / (E - 1)] * (E - 1), [1 / E] * E]
    (alarm,) = collapse_alarms(records(expert_load=load), E, num_experts_per_tok=2)
    assert "expert 0 of layer 0 gets 96% of the tokens (a fair share is 25%)" in alarm
    assert collapse_alarms(records(expert_load=load), E) == []  # with a slot for each of them it is a favourite only


def test_advice_against_a_takeover_is_what_was_seen_to_end_one() -> None:
    """docs/lab-log.md: a balance weight of 3 and a bias speed of 0.01 did; exploring and a lower router_lr did not."""
    load = [[0.24] + [0.76 / (E - 1)] * (E - 1), [1 / E] * E]
    run = records(expert_load=load)
    (alarm,) = collapse_alarms(run, E, num_experts_per_tok=4, guards=Guards(balance_weight=1.0))
    assert "Set --hyper.balance-weight 3 (it is 1), or --hyper.bias-speed 0.01 (" in alarm
    assert "explore" not in alarm
    guards = Guards(balance_weight=3.0, bias_speed=0.01)
    (alarm,) = collapse_alarms(run, E, num_experts_per_tok=4, guards=guards)
    assert "every setting that is known to help" in alarm
    assert "--hyper" not in alarm


def test_few_experts_that_all_must_be_used_never_take_over() -> None:
    assert collapse_alarms(records(expert_load=[[0.5, 0.5]]), 2, num_experts_per_tok=2) == []
    assert collapse_alarms(records(avg_k=1.0, expert_load=[[1.0]]), 1) == []


def test_the_alarm_waits_for_enough_records_and_stops_when_the_run_recovers() -> None:
    assert collapse_alarms(records(MIN_RECORDS - 1, avg_k=1.0, expert_load=ALONE), E) == []
    assert len(collapse_alarms(records(MIN_RECORDS, avg_k=1.0, expert_load=ALONE), E)) == 3
    assert collapse_alarms(records(avg_k=1.0, expert_load=ALONE) + records(), E) == []


def test_unknown_values_ring_no_alarm() -> None:
    for unknown in (None, float("nan")):
        assert collapse_alarms(records(avg_k=unknown, expert_load=[[unknown] * E] * L), E) == []


def test_steps_that_routed_nothing_count_nowhere() -> None:
    idle = np.zeros((L, E)).tolist()
    assert collapse_alarms(records(expert_load=idle), E) == []


odd = st.one_of(
    st.none(), st.floats(), st.text(max_size=3), st.lists(st.none() | st.floats(), max_size=3),
    st.lists(st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=3), max_size=3),
)  # fmt: skip
odd_records = st.lists(
    st.fixed_dictionaries({}, optional={"avg_k": odd, "gating_acc": odd, "expert_load": odd}), max_size=12
)


@given(odd_records, st.integers(1, 3))
def test_records_with_holes_never_raise(history: list[dict[str, Any]], experts: int) -> None:
    for alarm in collapse_alarms(history, experts):
        assert "--hyper." in alarm
