"""The statistics of a study: Student's t against tables, intervals, TOST, Holm, and verdicts on made-up results."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.analysis import analyse_rows, holm, study_table, t_interval, t_test, tost
from training.run_config import RunConfig
from training.student_t import incomplete_beta, t_cdf, t_quantile
from training.study_config import Arm, StudyConfig, expand
from training.study_results import empty_row

DIFFERENCES = [-0.03, -0.01, -0.025, -0.02, -0.015]


# Student's t ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-6, 0.025, 0.3, 0.5, 0.95, 0.975, 0.9995])
def test_quantiles_are_the_closed_forms_of_few_degrees_of_freedom(p: float) -> None:
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-12)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12, abs=1e-12)
    root = math.sqrt(4 * p * (1 - p))
    four = 2 * math.sqrt(max(0.0, math.cos(math.acos(root) / 3) / root - 1))
    assert t_quantile(p, 4) == pytest.approx(math.copysign(four, p - 0.5), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "df", "t"),
    [(0.975, 4, 2.776445105), (0.95, 9, 1.833112933), (0.975, 30, 2.042272456), (0.9, 120, 1.288646234)],
)
def test_quantiles_are_those_of_the_tables(p: float, df: int, t: float) -> None:
    assert t_quantile(p, df) == pytest.approx(t, abs=1e-9)
    assert t_quantile(1 - p, df) == pytest.approx(-t, abs=1e-9)


def test_the_distribution_function_has_its_known_values() -> None:
    assert t_cdf(0.0, 3) == 0.5
    assert t_cdf(1.0, 1) == pytest.approx(0.75, rel=1e-14)  # 1 / 2 + atan(1) / pi
    assert t_cdf(2.0, 4) == pytest.approx(0.9419417382415922, rel=1e-14)
    assert t_cdf(-3.5, 9) == pytest.approx(0.0033617578815294796, rel=1e-12)
    assert t_cdf(1.959963984540054, 1e8) == pytest.approx(0.975, abs=1e-7)  # the normal limit
    assert t_cdf(-1e8, 1) == pytest.approx(1e-8 / 3.141592653589793, rel=1e-9)
    assert (t_cdf(float("inf"), 2), t_cdf(float("-inf"), 2)) == (1.0, 0.0)


@settings(max_examples=25)
@given(st.floats(-30, 30), st.floats(0.5, 300))
def test_the_distribution_function_is_symmetric_and_its_quantile_undoes_it(t: float, df: float) -> None:
    assert t_cdf(t, df) + t_cdf(-t, df) == pytest.approx(1, abs=1e-14)
    p = t_cdf(-abs(t), df)
    if p > 0:
        assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, rel=1e-8)


def test_the_beta_integral_of_whole_numbers_is_a_binomial_sum() -> None:
    """I_x(2, 3) = P(at least 2 of 4) with chance x."""
    for x in (0.1, 0.5, 0.93):
        wanted = 6 * x**2 * (1 - x) ** 2 + 4 * x**3 * (1 - x) + x**4
        assert incomplete_beta(2, 3, x, 1 - x) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("bad", [lambda: t_cdf(1.0, 0), lambda: t_quantile(0.0, 3), lambda: t_quantile(1.0, 3)])
def test_numbers_outside_the_domain_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="expected"):
        bad()


# Tests and intervals --------------------------------------------------------------------------------------------------


def test_interval_t_test_and_tost_agree_with_an_independent_program() -> None:
    assert t_interval(DIFFERENCES) == pytest.approx((-0.02, -0.029816215807387785, -0.010183784192612216), rel=1e-12)
    assert t_test(DIFFERENCES) == pytest.approx(0.00481267833004422, rel=1e-12)
    assert tost(DIFFERENCES, 0.03) == pytest.approx(0.023710327792159806, rel=1e-12)


@settings(max_examples=25)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9), st.floats(0.01, 0.5))
def test_tost_rejects_exactly_where_the_90_percent_interval_lies_within_the_margin(values, margin: float) -> None:
    p, interval = tost(values, margin), t_interval(values, 0.90)
    assert interval.low is not None
    assert interval.high is not None
    within = -margin < interval.low and interval.high < margin
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == within


def test_values_without_spread_are_certain() -> None:
    assert (t_test([0.5, 0.5]), tost([0.5, 0.5], 0.1), tost([0.01, 0.01], 0.1)) == (0.0, 1.0, 0.0)
    assert (t_test([0.0, 0.0]), tost([0.0, 0.0], 0.1)) == (1.0, 0.0)


def test_one_value_has_no_interval() -> None:
    assert t_interval([3.0]) == (3.0, None, None)
    assert t_test([3.0]) is None
    assert tost([3.0], 1.0) is None


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_never_falls() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# Verdicts -------------------------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2, 3, 4)
NOISE = (0.00, 0.21, -0.17, 0.35, -0.08)  # of seeds: large, the same in every arm
WOBBLE = (0.002, -0.001, 0.001, -0.002, 0.000)


def study_of(arms: dict[str, float], **changes: Any) -> tuple[StudyConfig, list[dict]]:
    """A study whose arms score 2 + effect + noise of the seed + a wobble of their own."""
    listed = [Arm(name, {"hyper.pi_gamma": 0.1 + number / 100}) for number, name in enumerate(arms)]
    study = StudyConfig(
        **{"name": "made-up", "margin": 0.02, "arms": listed, "seeds": SEEDS, "base": RunConfig()} | changes
    )
    rows = []
    for run in expand(study):
        at = study.seeds.index(run.seed)
        wobble = WOBBLE[(at + list(arms).index(run.arm)) % 5]
        score = 2 + arms[run.arm] + NOISE[at] + wobble
        rows.append(empty_row(run) | {"nats_per_token": score, "avg_k": 4.0, "status": "finished"})
    return study, rows


def test_verdicts_follow_the_paired_differences_not_the_spread_between_seeds() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1, "bad": 0.1, "same": 0.001})
    analysis = analyse_rows(study, rows)
    against = analysis["against_baseline"]
    assert {name: pair["verdict"] for name, pair in against.items()} == {
        "good": "better", "bad": "worse", "same": "equivalent",
    }  # fmt: skip
    assert against["good"]["difference"] == pytest.approx(-0.1, abs=0.003)
    assert against["good"]["beyond_margin"]
    assert not against["same"]["beyond_margin"]
    assert against["same"]["tost_p"] < 0.05
    unpaired = analysis["arms"]["good"]
    assert unpaired["low"] < analysis["arms"]["base"]["mean"] < unpaired["high"]
    assert analysis["baseline"] == "base"
    assert analysis["answer"].startswith(
        "Better than base: good (-0.100); worse than base: bad (+0.100); within 0.02 nats"
    )


def test_text_from_a_csv_gives_the_same_analysis() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert analyse_rows(study, as_text) == analyse_rows(study, rows)


def test_one_seed_decides_nothing() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.5}, seeds=(0,))
    analysis = analyse_rows(study, rows)
    assert analysis["against_baseline"]["good"]["verdict"] == "undecided"
    assert analysis["arms"]["good"]["low"] is None
    assert "not told apart" in analysis["answer"]
    assert "no arm is better" in analysis["answer"].lower()


def test_an_arm_with_a_diverged_run_is_never_better() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    lost = next(row for row in rows if row["arm"] == "good")
    lost |= {"status": "diverged", "nats_per_token": None}
    analysis = analyse_rows(study, rows)
    assert analysis["arms"]["good"]["n"] == 4
    assert analysis["against_baseline"]["good"]["n"] == 4
    assert analysis["against_baseline"]["good"]["verdict"] == "undecided"
    assert "1 diverged" in study_table(analysis)


def test_many_arms_of_pure_noise_are_corrected_for_their_number() -> None:
    """One arm of many that looks significant alone is undecided beside the others."""
    study, rows = study_of({"base": 0.0} | {f"arm{i}": 0.0 for i in range(9)}, margin=1e-4)
    for row in rows:
        if row["arm"] == "arm3":
            at = study.seeds.index(row["seed"])
            row["nats_per_token"] = 2 + NOISE[at] + WOBBLE[at] + (0.004, 0.009, 0.003, 0.010, 0.002)[at]
    pair = analyse_rows(study, rows)["against_baseline"]["arm3"]
    assert pair["p"] < 0.05 < pair["p_holm"]
    assert pair["verdict"] == "undecided"


def test_a_tuned_axis_gives_every_arm_its_own_best_value() -> None:
    arms = (Arm("base"), Arm("other", {"hyper.router_lr": 0.0}))
    study = StudyConfig(
        "tuned", margin=0.02, arms=arms, axes={"hyper.lr": [1e-3, 2e-3]}, tune=["hyper.lr"], seeds=SEEDS
    )
    rows = []
    for run in expand(study):
        worse = 0.5 if (run.arm == "base") == (run.config.hyper.lr == 2e-3) else 0.0
        score = 2 + worse + NOISE[study.seeds.index(run.seed)]
        rows.append(empty_row(run) | {"nats_per_token": score, "avg_k": 4.4 if run.arm == "base" else 4.0})
        rows[-1]["status"] = "finished"
    analysis = analyse_rows(study, rows)
    assert analysis["arms"]["base"]["tuned"] == {"hyper.lr": 1e-3}
    assert analysis["arms"]["other"]["tuned"] == {"hyper.lr": 2e-3}
    assert analysis["against_baseline"]["other"]["verdict"] == "equivalent"
    assert analysis["against_baseline"]["other"]["k_matched"] is False
    assert all("lr-0.001" in run or "lr=0.001" in run for run in analysis["arms"]["base"]["runs"])


def test_the_table_puts_the_best_arm_first() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    lines = study_table(analyse_rows(study, rows)).splitlines()
    assert lines[1].startswith("good")
    assert "better" in lines[1]
    assert lines[2].startswith("base")
    assert lines[-1].startswith("Better than base")
