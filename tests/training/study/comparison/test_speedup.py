"""Effective speed-up: the steps that a curve needs, against loops, and simulated studies whose speed-up is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.report.html.wording import speedup_bounds, speedup_text
from training.study.analysis import analyse_rows
from training.study.comparison.speedup import FARTHEST, Scores, effective_speedup, monotone, steps_needed
from training.study.comparison.table import study_table
from training.study.config import Arm, StudyConfig, expand
from training.study.summary import empty_row

STEPS = range(50, 801, 50)


def line(speed: float, noise: float = 0.0, seed: int = 0) -> Scores:
    """Held-out curve of a run that learns `speed` times as fast as 3 - 0.2 log(steps)."""
    luck = noise * np.random.default_rng(seed).standard_normal(len(STEPS))
    return [(step, 3 - 0.2 * math.log(speed * step) + extra) for step, extra in zip(STEPS, luck, strict=True)]


def power(speed: float) -> Scores:
    return [(step, 1.5 + 4 * (speed * step) ** -0.4) for step in STEPS]


# A curve --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_the_monotone_curve_is_the_nearest_by_pools_of_neighbours(values: list[int]) -> None:
    """Pool adjacent violators, by loops."""
    pools = [[float(value)] for value in values]
    while rising := [i for i, (a, b) in enumerate(pairwise(pools)) if np.mean(a) < np.mean(b)]:
        pools[rising[0]] += pools.pop(rising[0] + 1)
    np.testing.assert_allclose(
        monotone(np.array(values, dtype=float)), [np.mean(pool) for pool in pools for _ in pool], atol=1e-9
    )


@given(st.lists(st.floats(0.01, 0.3), min_size=3, max_size=9), st.floats(0.0, 1.0))
def test_within_the_curve_the_steps_needed_are_its_inverse(drops: list[float], share: float) -> None:
    losses = 5 - np.cumsum(drops)
    curve = [(100.0 * (i + 1), float(loss)) for i, loss in enumerate(losses)]
    loss = float(losses[0] + share * (losses[-1] - losses[0]))
    needed = steps_needed(curve, loss)
    at = [math.log(step) for step, _ in curve]
    assert needed.is_reached
    assert not needed.early
    assert np.interp(math.log(needed.steps), at, losses) == pytest.approx(loss, abs=1e-6)


def test_of_a_plateau_the_first_step_counts() -> None:
    assert steps_needed([(10, 3.0), (20, 2.0), (40, 2.0), (80, 1.0)], 2.0).steps == pytest.approx(20)


def test_a_loss_above_the_first_score_needs_no_more_than_its_steps() -> None:
    needed = steps_needed(line(1.0), 9.0)
    assert (needed.steps, needed.early, needed.is_reached) == (50, True, True)


def test_a_curve_that_rises_at_its_end_gives_no_number_below_it() -> None:
    needed = steps_needed([(10, 3.0), (20, 2.0), (40, 2.1), (80, 2.2)], 1.9)
    assert (needed.steps, needed.measured) == (math.inf, 80)


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [0.1, 0.4, 0.66, 0.97, 1.0])
def test_a_slower_arm_gets_the_speed_up_that_it_was_made_with(speed: float) -> None:
    result = effective_speedup([line(speed)] * 3, [line(1.0)] * 3)
    assert result is not None
    assert result["estimate"] == pytest.approx(speed, rel=1e-9)
    assert result["at_least"] == result["estimate"]
    assert (result["reached"], result["early"], result["n"]) == (3, 0, 3)
    assert speedup_text(result) == f"{speed:.2f}"


@pytest.mark.parametrize("speed", [1.02, 1.5, 3.9])
def test_a_faster_arm_is_beyond_the_curve_and_says_so(speed: float) -> None:
    """Exact as long as the curve goes on as it was."""
    result = effective_speedup([line(speed)] * 2, [line(1.0)] * 2)
    assert result is not None
    assert result["estimate"] == pytest.approx(speed, rel=1e-9)
    assert (result["at_least"], result["reached"]) == (1.0, 0)
    assert speedup_text(result) == f"> 1.00, {speed:.2f} extrapolated"


def test_beyond_the_farthest_step_there_is_a_bound_alone() -> None:
    result = effective_speedup([line(1.1 * FARTHEST), line(1.2)], [line(1.0)] * 2)
    assert result is not None
    assert (result["estimate"], result["low"], result["high"]) == (None, None, None)
    assert speedup_text(result) == "> 1.00"
    assert speedup_bounds(result) == ""


def test_an_arm_below_the_first_score_is_slower_than_the_number_says() -> None:
    result = effective_speedup([line(0.01)], [line(1.0)])
    assert result is not None
    assert speedup_text(result) == "< 0.06"


def test_an_arm_of_fewer_steps_is_compared_by_its_own() -> None:
    """Half of the steps for the same loss is twice as fast."""
    half = [(step / 2, loss) for step, loss in line(1.0)]
    result = effective_speedup([half], [line(1.0)])
    assert result is not None
    assert result["estimate"] == pytest.approx(2.0)
    assert result["reached"] == 1


def test_curves_of_a_power_law_give_its_speed_up_to_one_percent() -> None:
    for speed in (0.3, 0.655, 0.9):
        result = effective_speedup([power(speed)], [power(1.0)])
        assert result is not None
        assert result["estimate"] == pytest.approx(speed, rel=0.01)


def test_without_curves_there_is_none() -> None:
    assert effective_speedup([], []) is None
    assert effective_speedup([()], [line(1.0)]) is None
    assert effective_speedup([line(1.0)], [line(1.0)[:1]]) is None
    assert (speedup_text(None), speedup_bounds(None)) == ("", "")


def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says() -> None:
    """Runs of a seed have their luck in common; 300 simulated studies of five seeds, at 95 %."""
    covered, truth = 0, 0.7
    for study in range(300):
        luck = np.random.default_rng(study).normal(0, 0.05, 5)
        theirs = [[(s, y + shift) for s, y in line(1.0, 0.004, 10 * study + i)] for i, shift in enumerate(luck)]
        ours = [[(s, y + shift) for s, y in line(truth, 0.004, 10**6 + 10 * study + i)] for i, shift in enumerate(luck)]
        result = effective_speedup(ours, theirs)
        assert result is not None
        covered += result["low"] < truth < result["high"]
    assert 0.90 <= covered / 300 <= 0.99


# A study --------------------------------------------------------------------------------------------------------------


def test_a_simulated_study_of_known_speed_up_says_it_in_analysis_and_terminal() -> None:
    speeds = {"base": 1.0, "slow": 0.6, "fast": 1.5}
    arms = tuple(Arm(name, {"hyper.pi_gamma": speed}) for name, speed in speeds.items())
    study = StudyConfig("speed", margin=0.02, arms=arms, seeds=(0, 1, 2))
    rows, curves = [], {}
    for run in expand(study):
        curves[run.id] = [(step, loss + run.seed / 10) for step, loss in line(speeds[run.arm])]
        rows.append(empty_row(run) | {"nats_per_token": curves[run.id][-1][1], "status": "finished"})
    analysis = analyse_rows(study, rows, None, curves)
    against = {label: pair["effective_speedup"] for label, pair in analysis["against_baseline"].items()}
    assert against["slow"]["estimate"] == pytest.approx(0.6)
    assert (against["slow"]["low"], against["slow"]["high"]) == (pytest.approx(0.6), pytest.approx(0.6))
    assert against["fast"]["estimate"] == pytest.approx(1.5)
    assert against["fast"]["reached"] == 0
    lines = study_table(analysis).splitlines()
    assert "speed-up" in lines[0]
    assert "> 1.00, 1.50 extrapolated" in next(of for of in lines if of.startswith("fast"))
    assert "0.60 to 0.60" in next(of for of in lines if of.startswith("slow"))


def test_a_run_that_diverged_makes_no_pair_and_no_curve_no_column() -> None:
    arms = (Arm("base"), Arm("other", {"hyper.pi_gamma": 0.5}))
    study = StudyConfig("speed", margin=0.02, arms=arms, seeds=(0, 1))
    rows = [empty_row(run) | {"nats_per_token": 2.0 + run.seed, "status": "finished"} for run in expand(study)]
    rows[0]["status"] = "diverged"
    curves = {row["run"]: line(0.5) for row in rows}
    analysis = analyse_rows(study, rows, None, curves)
    assert analysis["against_baseline"]["other"]["effective_speedup"]["n"] == 1
    analysis = analyse_rows(study, rows)
    assert analysis["against_baseline"]["other"]["effective_speedup"] is None
    assert "speed-up" not in study_table(analysis)
