"""The statistics of a study: intervals and tests against tables, TOST, Holm, and verdicts on made-up results."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtr, stdtrit

from benchmarks.experiments.compare import paired
from training.run.config import RunConfig
from training.study.analysis import analyse_rows, judge
from training.study.comparison.statistics import beyond, holm, p_value, step_down, t_interval, t_test, tost
from training.study.comparison.table import study_table
from training.study.config import Arm, StudyConfig, StudyRun, expand
from training.study.summary import empty_row

DIFFERENCES = [-0.03, -0.01, -0.025, -0.02, -0.015]


# Student's t, by way of the intervals and tests that stand on it ----------------------------------------------------


def spread_of(count: int, mean: float = 0.0) -> list[float]:
    """Numbers of that mean whose standard error is 1: as far from the mean as that takes, half above and half below."""
    steps = [(-1.0) ** i for i in range(count - count % 2)] + [0.0] * (count % 2)
    scale = math.sqrt(count * (count - 1) / sum(step * step for step in steps))
    return [mean + scale * step for step in steps]


@pytest.mark.parametrize("confidence", [0.05, 0.4, 0.9, 0.95, 0.999])
def test_intervals_are_as_wide_as_the_closed_forms_of_few_degrees_of_freedom_say(confidence: float) -> None:
    p = (1 + confidence) / 2
    root = math.sqrt(4 * p * (1 - p))
    wanted = {
        1: math.tan(math.pi * (p - 0.5)),
        2: (2 * p - 1) / math.sqrt(2 * p * (1 - p)),
        4: 2 * math.sqrt(math.cos(math.acos(root) / 3) / root - 1),
    }
    for df, t in wanted.items():
        assert t_interval(spread_of(df + 1), confidence).high == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize(
    ("confidence", "df", "t"),
    [(0.95, 4, 2.776445105), (0.90, 9, 1.833112933), (0.95, 30, 2.042272456), (0.80, 120, 1.288646234)],
)
def test_intervals_are_as_wide_as_the_tables_say(confidence: float, df: int, t: float) -> None:
    assert t_interval(spread_of(df + 1, 7.0), confidence) == pytest.approx((7.0, 7.0 - t, 7.0 + t), abs=1e-8)


@pytest.mark.parametrize(
    ("t", "df", "p"),
    [(1.0, 1, 0.25), (2.0, 4, 0.0580582617584078), (3.5, 9, 0.0033617578815294796), (1e8, 1, 1e-8 / math.pi)],
)
def test_p_values_are_twice_the_known_tails(t: float, df: int, p: float) -> None:
    """P(T > 1) = 1 / 4 with one degree of freedom; 1 / (pi t) far out."""
    for sign in (-1, 1):
        assert t_test(spread_of(df + 1, sign * t)) == pytest.approx(2 * p, rel=1e-6)
        equivalence = tost(spread_of(df + 1, sign * t), 2 * t)
        assert equivalence == (None if df == 1 else pytest.approx(p, rel=1e-6)), "two pairs show no equivalence"


# Tests and intervals --------------------------------------------------------------------------------------------------


def test_interval_t_test_and_tost_agree_with_an_independent_program() -> None:
    assert t_interval(DIFFERENCES) == pytest.approx((-0.02, -0.029816215807387785, -0.010183784192612216), rel=1e-12)
    assert t_test(DIFFERENCES) == pytest.approx(0.00481267833004422, rel=1e-12)
    assert tost(DIFFERENCES, 0.03) == pytest.approx(0.023710327792159806, rel=1e-12)


def test_three_pairs_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, se = 1 / sqrt 3; with two degrees of freedom P(T <= t) = 1/2 + t / (2 sqrt(2 + t^2)).

    Paired t: t = 2 sqrt 3, so p = 1 - sqrt(12 / 14). TOST within 4: t = (2 - 4) sqrt 3 and (2 + 4) sqrt 3; the larger p
    is that of the first. The interval's t solves 2 P - 1 = 0.95: t^2 = 2 * 0.95^2 / (1 - 0.95^2).
    """
    values = [1.0, 2.0, 3.0]
    assert t_test(values) == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    assert tost(values, 4.0) == pytest.approx((1 - math.sqrt(12 / 14)) / 2, rel=1e-12)
    half = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) / math.sqrt(3)
    assert t_interval(values) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=9), st.floats(0.01, 0.5))
def test_tost_rejects_exactly_where_the_90_percent_interval_lies_within_the_margin(values, margin: float) -> None:
    p, interval = tost(values, margin), t_interval(values, 0.90)
    assert interval.low is not None
    assert interval.high is not None
    within = -margin < interval.low and interval.high < margin
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == within


def test_values_without_spread_are_certain() -> None:
    assert (t_test([0.5] * 3), tost([0.5] * 3, 0.1), tost([0.01] * 3, 0.1)) == (0.0, 1.0, 0.0)
    assert (t_test([0.0] * 3), tost([0.0] * 3, 0.1)) == (1.0, 0.0)
    assert (beyond([0.5] * 3, 0.1), beyond([-0.5] * 3, 0.1), beyond([0.01] * 3, 0.1)) == (0.0, 0.0, 1.0)
    assert t_interval([0.5] * 3) == (0.5, 0.5, 0.5)


def test_two_values_that_are_the_same_decide_nothing() -> None:
    """Nor do two that differ in the last bit of a subtraction, which a t-test takes for near certainty."""
    for values in ([0.5, 0.5], [2.1 - 2.0, 3.1 - 3.0]):
        assert (t_test(values), tost(values, 1.0), beyond(values, 0.01)) == (None, None, None)
        assert t_interval(values)[1:] == (None, None)
    assert t_test([0.0, 0.0]) == 1.0, "what changes nothing is not different"
    assert t_test([0.5, 0.500001]) < 0.05


def test_two_pairs_near_each_other_are_not_equivalent() -> None:
    assert tost([0.001, 0.001001], 0.02) is None
    assert tost([0.001, 0.001001, 0.001002], 0.02) < 1e-6


def test_one_value_has_no_interval() -> None:
    assert t_interval([3.0]) == (3.0, None, None)
    assert t_test([3.0]) is None
    assert tost([3.0], 1.0) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_decides_nothing_whatever_stands_beside_it(broken: float) -> None:
    """The range of an infinite value is no number above a share of it: that is no value without spread."""
    for values in ([0.1, broken, 0.2], [broken] * 3, np.array([[0.1, 0.2], [0.1, broken], [0.1, 0.3]])):
        assert (t_test(values), tost(values, 1.0), beyond(values, 0.01)) == (None, None, None)
        mean, low, high = t_interval(values)
        assert math.isnan(mean)
        assert (low, high) == (None, None)
    studies = np.array([[0.1, broken, 0.2], DIFFERENCES[:3]])[..., None]
    p = p_value(studies)
    assert np.isnan(p[0])
    assert p[1] == pytest.approx(t_test(DIFFERENCES[:3])), "one study's value is no other's"


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
        arm = next(name for name in arms if f"{run.arm} ".startswith(f"{name} "))
        wobble = WOBBLE[(at + list(arms).index(arm)) % 5]
        score = 2 + arms[arm] + NOISE[at] + wobble
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


def test_a_sentence_counts_the_arms_that_are_too_many_to_name() -> None:
    study, rows = study_of({"base": 0.0} | {f"arm {i}": -0.1 * i for i in range(1, 9)}, seeds=(0,))
    answer = analyse_rows(study, rows)["answer"]
    assert re.search(r"; no difference found from base: 8 of 8 \(-0\.80\d to -0\.10\d\)\.$", answer)


def test_a_sentence_does_not_take_arms_without_runs_for_arms_without_a_difference() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1, "later": 0.0})
    rows = [row | ({"status": "unfinished", "nats_per_token": None} if row["arm"] == "later" else {}) for row in rows]
    answer = analyse_rows(study, rows)["answer"]
    assert answer.endswith("; 1 of 2 without a finished pair of runs: later.")
    assert "later (" not in answer


def test_an_arm_whose_change_has_no_effect_is_told() -> None:
    study, rows = study_of({"base": 0.0, "idle": 0.0, "same": 0.001})
    for row in rows:
        if row["arm"] == "idle":
            row["nats_per_token"] = next(r["nats_per_token"] for r in rows if r["run"] == f"base-seed{row['seed']}")
    against = analyse_rows(study, rows)["against_baseline"]
    assert (against["idle"]["identical"], against["same"]["identical"]) == (True, False)
    assert against["idle"]["verdict"] == "equivalent"


def test_one_seed_decides_nothing() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.5}, seeds=(0,))
    analysis = analyse_rows(study, rows)
    assert analysis["against_baseline"]["good"]["verdict"] == "undecided"
    assert analysis["arms"]["good"]["low"] is None
    assert "no difference found from base: good (-0." in analysis["answer"]
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


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_arm_with_a_score_that_is_not_finite_is_never_better_nor_worse(broken: float) -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    next(row for row in rows if row["arm"] == "good")["nats_per_token"] = broken
    analysis = analyse_rows(study, rows)
    pair, arm = analysis["against_baseline"]["good"], analysis["arms"]["good"]
    assert (pair["verdict"], pair["n"], arm["diverged"], arm["n"]) == ("undecided", 4, 1, 4)
    assert math.isfinite(arm["mean"])
    assert "undecided, 1 diverged" in study_table(analysis)
    json.dumps(analysis, allow_nan=False)  # the page and other readers want numbers
    everywhere = judge({"good": np.array([[-0.1], [broken], [-0.1]])}, study.margin)["good"]
    assert everywhere["verdict"] == "undecided"
    assert {everywhere[key] for key in ("difference", "low", "p", "tost_p", "beyond_p", "beyond_margin")} == {None}


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


# The family ----------------------------------------------------------------------------------------------------------


def test_every_comparison_of_all_axes_is_of_one_family_whether_it_has_runs_or_not() -> None:
    """Four points of two axes: eight comparisons, two of which nobody has run."""
    study, rows = study_of(
        {"base": 0.0, "good": -0.1, "later": 0.0}, axes={"hyper.lr": [1e-3, 2e-3], "hyper.weight_decay": [0.0, 0.1]}
    )
    for number, row in enumerate(rows):
        row["nats_per_token"] += 0.05 * math.sin(number)
        if row["arm"].startswith("later") and row["hyper.lr"] == 1e-3:
            row |= {"status": "unfinished", "nats_per_token": None}
    against = analyse_rows(study, rows)["against_baseline"]
    assert len(against) == 8
    for key in ("p", "tost_p", "beyond_p"):
        known = {label: pair[key] for label, pair in against.items() if pair[key] is not None}
        assert len(known) == 6
        smallest = min(known, key=known.__getitem__)
        assert against[smallest][f"{key}_holm"] == pytest.approx(min(1.0, 8 * known[smallest]))
        corrected = holm({label: known.get(label, 1.0) for label in against})
        assert {label: against[label][f"{key}_holm"] for label in known} == {label: corrected[label] for label in known}


def test_equivalence_is_corrected_and_its_interval_is_the_one_that_decided() -> None:
    """Alone it would be equivalent; as one of many, its p is multiplied, and the interval is wider."""
    arms = {"base": 0.0} | {f"arm{i}": 0.001 * i for i in range(9)}
    study, rows = study_of(arms)
    against = analyse_rows(study, rows)["against_baseline"]
    factors = step_down({label: pair["tost_p"] for label, pair in against.items()})
    assert sorted(factors.values()) == list(range(1, 10))
    equivalent = {label: pair for label, pair in against.items() if pair["verdict"] == "equivalent"}
    assert len(equivalent) > 1
    for label, pair in equivalent.items():
        assert pair["level"] == pytest.approx(1 - 0.1 / factors[label])
        assert -0.02 < pair["low"] <= pair["high"] < 0.02
    narrow, _ = study_of(arms, margin=max(abs(pair["high"]) for pair in against.values()) * 0.8)
    pairs = analyse_rows(narrow, rows)["against_baseline"]
    torn = {label: pair for label, pair in pairs.items() if pair["tost_p"] < 0.05 <= pair["tost_p_holm"]}
    assert torn
    assert "equivalent" not in {pair["verdict"] for pair in torn.values()}
    assert {pair["level"] for pair in torn.values()} == {0.95}


def test_the_interval_beside_a_single_equivalent_arm_is_that_of_90_percent_and_says_so() -> None:
    study, rows = study_of({"base": 0.0, "same": 0.001})
    analysis = analyse_rows(study, rows)
    pair = analysis["against_baseline"]["same"]
    differences = [
        ours["nats_per_token"] - base["nats_per_token"] for base, ours in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert (pair["verdict"], pair["level"]) == ("equivalent", 0.9)
    assert (pair["difference"], pair["low"], pair["high"]) == pytest.approx(t_interval(differences, 0.9))
    assert "(90 %)" in study_table(analysis)


def test_an_arm_is_beyond_the_margin_by_a_corrected_test() -> None:
    """Its interval of 95 % is; but it is one of ten."""
    study, rows = study_of({"base": 0.0} | {f"arm{i}": 0.0 for i in range(10)})
    for row in rows:
        if row["arm"] == "arm3":
            at = study.seeds.index(row["seed"])
            row["nats_per_token"] = rows[at * 11]["nats_per_token"] + 0.06 + (0.02, -0.02, 0.015, -0.02, 0.0)[at]
    pair = analyse_rows(study, rows)["against_baseline"]["arm3"]
    assert (pair["verdict"], pair["beyond_margin"]) == ("worse", False)
    assert pair["low"] > study.margin
    assert pair["beyond_p"] < 0.05 < pair["beyond_p_holm"]


@pytest.mark.parametrize(("effect", "spread"), [(0.001, 0.001), (0.0, 0.0), (0.3, 0.0)])
def test_two_pairs_show_no_equivalence_and_two_that_are_the_same_nothing(effect: float, spread: float) -> None:
    study, rows = study_of({"base": 0.0, "other": 0.0}, seeds=(0, 1))
    for base, other in zip(rows[::2], rows[1::2], strict=True):
        other["nats_per_token"] = base["nats_per_token"] + effect + spread * other["seed"]
    pair = analyse_rows(study, rows)["against_baseline"]["other"]
    assert (pair["n"], pair["verdict"], pair["beyond_margin"] or False) == (2, "undecided", False)
    assert pair["tost_p"] is pair["tost_p_holm"] is None
    assert pair["identical"] is (effect == 0)


# Streams -------------------------------------------------------------------------------------------------------------

TASKS = {"a": "stdlib:re/*.py", "b": "stdlib:json/*.py"}
ORDERS = (("a", "b"), ("b", "a"))


def stream_of(differences: list[list[float]]) -> tuple[StudyConfig, list[dict]]:
    """A stream whose arm differs from its baseline by so much at each seed (row) and order."""
    study, rows = study_of(
        {"base": 0.0, "other": 0.0}, tasks=TASKS, orders=ORDERS, seeds=range(len(differences)), base=RunConfig(steps=4)
    )
    for base, other in zip(rows[::2], rows[1::2], strict=True):
        order = [" > ".join(order) for order in ORDERS].index(other["order"])
        other["nats_per_token"] = base["nats_per_token"] + differences[other["seed"]][order]
        for row in (base, other):
            row |= dict.fromkeys(("bwt", "forgetting", "plasticity"), row["nats_per_token"])
    return study, rows


def test_pairs_of_a_stream_are_seeds_and_what_orders_have_in_common_counts_once() -> None:
    """One seed's luck in both orders is no two pairs, and one order's effect on all seeds is no effect of the arm."""
    lucky = [[0.10, 0.101], [0.02, 0.019], [0.05, 0.051], [0.005, 0.004]]
    study, rows = stream_of(lucky)
    analysis = analyse_rows(study, rows)
    pair, means = analysis["against_baseline"]["other"], [sum(row) / 2 for row in lucky]
    assert (pair["n"], pair["orders"]) == (4, 2)
    assert pair["difference"] == pytest.approx(sum(means) / 4)
    assert pair["p"] == pytest.approx(t_test(means))
    assert (pair["low"], pair["high"]) == pytest.approx(t_interval(means)[1:])
    assert t_test([value for row in lucky for value in row]) < 0.05 < pair["p"]
    assert analysis["continual"]["other"]["bwt"]["difference_low"] == pytest.approx(pair["low"])
    ordered = [[0.1, 0.001], [0.101, 0.003], [0.099, 0.002], [0.103, 0.0]]
    pair = analyse_rows(*stream_of(ordered))["against_baseline"]["other"]
    assert t_test([sum(row) / 2 for row in ordered]) < 1e-4 < 0.05 < pair["p"]
    assert pair["verdict"] == "undecided"
    same = pair["same_orders_low"], pair["same_orders_high"]
    assert same == pytest.approx(t_interval([sum(row) / 2 for row in ordered])[1:]), "told beside it"
    alike = [[0.1, 0.102], [0.101, 0.099], [0.099, 0.1], [0.103, 0.101]]
    assert analyse_rows(*stream_of(alike))["against_baseline"]["other"]["verdict"] == "worse"


LUCK = np.array([-0.03, -0.01, 0.01, 0.03])
TABLES = {  # the test of them that is the most careful
    "seeds": np.array([[0.02, 0.03], [0.09, 0.10], [0.04, 0.05], [0.0, 0.0]]),
    "orders": np.array([[0.02, 0.08, 0.03], [0.04, 0.09, 0.05], [0.01, 0.08, 0.01], [0.03, 0.09, 0.04]]),
    "both": 0.0387 + LUCK[:, None] + LUCK,
}


@pytest.mark.parametrize("most", TABLES)
def test_of_several_orders_the_three_tests_have_to_agree(most: str) -> None:
    """By hand: the means of seeds and of orders, and Welch's formula with the variances of both."""
    table = TABLES[most]
    seeds, orders, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    v, w = seeds.var(ddof=1) / len(seeds), orders.var(ddof=1) / len(orders)
    df = (v + w) ** 2 / (v**2 / (len(seeds) - 1) + w**2 / (len(orders) - 1))
    half = stdtrit(df, 0.975) * math.sqrt(v + w)
    p = {name: t_test(means.tolist()) for name, means in (("seeds", seeds), ("orders", orders))}
    p["both"] = 2 * stdtr(df, -mean / math.sqrt(v + w))
    assert max(p, key=p.__getitem__) == most
    assert t_test(table) == pytest.approx(p[most])
    spans = [t_interval(seeds.tolist()), t_interval(orders.tolist()), (mean, mean - half, mean + half)]
    wanted = mean, min(low for _, low, _ in spans), max(high for _, _, high in spans)
    assert t_interval(table) == pytest.approx(wanted)


def test_a_seed_without_one_of_the_orders_is_no_pair() -> None:
    study, rows = stream_of([[0.1, 0.102], [0.101, 0.099], [0.099, 0.1], [0.5, 0.5]])
    rows[-1] |= {"status": "unfinished", "nats_per_token": None}
    analysis = analyse_rows(study, rows)
    pair, arms = analysis["against_baseline"]["other"], analysis["arms"]
    assert (pair["n"], pair["difference"]) == (3, pytest.approx(0.6010 / 6))
    assert [(arms[label]["n"], arms[label]["seeds"]) for label in ("base", "other")] == [(8, 4), (6, 3)]
    assert paired(rows, "other", "base", "nats_per_token").endswith(", 3 pairs of 2 orders")
    for row in rows:
        if row["order"] == "b > a" and row["arm"] == "other":
            row |= {"status": "unfinished", "nats_per_token": None}
    analysis = analyse_rows(study, rows)
    assert (analysis["against_baseline"]["other"]["n"], analysis["against_baseline"]["other"]["verdict"]) == (
        0, "undecided",
    )  # fmt: skip
    assert (analysis["arms"]["other"]["n"], analysis["arms"]["other"]["low"]) == (4, None)
    assert analysis["arms"]["other"]["mean"] is not None


# Tuning --------------------------------------------------------------------------------------------------------------


def at_every_point(study: StudyConfig) -> list[StudyRun]:
    """Runs of all seeds at every point of the axes, of which the analysis takes those that count."""
    return expand(replace(study, seeds=(*study.seeds, *study.tune_seeds), tune_seeds=()))


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


def test_seeds_of_the_tuning_choose_the_point_and_are_not_compared() -> None:
    """At the other rate the compared runs are better, by luck that the tuning's seeds have not."""
    study = StudyConfig(
        "tuned", margin=0.02, arms=(Arm("base"), Arm("other", {"hyper.router_lr": 0.0})), seeds=SEEDS,
        axes={"hyper.lr": [1e-3, 2e-3]}, tune=["hyper.lr"], tune_seeds=(7, 8),
    )  # fmt: skip
    rows = []
    for run in at_every_point(study):
        lucky = (run.config.hyper.lr == 2e-3) == (run.seed in SEEDS)
        noise = NOISE[run.seed] + WOBBLE[run.seed - (run.arm == "base")] if run.seed in SEEDS else 0.0
        rows.append(empty_row(run) | {"nats_per_token": 2 - 0.5 * lucky + noise, "status": "finished"})
    analysis = analyse_rows(study, rows)
    assert {arm["tuned"]["hyper.lr"] for arm in analysis["arms"].values()} == {1e-3}
    assert analysis["arms"]["base"]["n"] == len(SEEDS)
    assert analysis["arms"]["base"]["mean"] == pytest.approx(2 + sum(NOISE) / 5)
    assert not any("seed7" in run or "seed8" in run for run in analysis["arms"]["base"]["runs"])
    assert (analysis["tuned_on"], analysis["note"]) == ([7, 8], "")
    assert analysis["against_baseline"]["other"]["tried"] == 1
    rows = [row | ({"status": "diverged"} if row["seed"] == 7 and row["hyper.lr"] == 1e-3 else {}) for row in rows]
    arms = analyse_rows(study, rows)["arms"].values()
    assert {(arm["tuned"]["hyper.lr"], arm["diverged"]) for arm in arms} == {(2e-3, 0)}, "what diverges is not chosen"


def test_what_was_tuned_by_the_compared_runs_is_corrected_for_all_that_was_tried_and_says_so() -> None:
    arms = (Arm("base"), Arm("other", {"hyper.router_lr": 0.0}))
    study = StudyConfig(
        "tuned", margin=0.02, arms=arms, axes={"hyper.lr": [1e-3, 2e-3, 3e-3]}, tune=["hyper.lr"], seeds=SEEDS
    )
    rows = []
    for run in expand(study):
        score = 2 + 10 * run.config.hyper.lr + WOBBLE[run.seed - (run.arm == "base")]
        rows.append(empty_row(run) | {"nats_per_token": score, "status": "finished"})
    analysis = analyse_rows(study, rows)
    pair, table = analysis["against_baseline"]["other"], study_table(analysis)
    assert pair["tried"] == 9
    for key in ("p", "tost_p", "beyond_p"):
        assert pair[f"{key}_holm"] == pytest.approx(min(1.0, 9 * pair[key]))
    assert (pair["verdict"], pair["level"]) == ("equivalent", pytest.approx(1 - 0.1 / 9))
    assert analysis["note"].startswith("Tuned (hyper.lr) by the runs that are compared: every p is multiplied")
    assert analysis["note"] in table
    assert analyse_rows(*study_of({"base": 0.0, "good": -0.1}))["note"] == "", "nothing was tuned"


def test_the_table_puts_the_best_arm_first() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    lines = study_table(analyse_rows(study, rows)).splitlines()
    assert lines[1].startswith("good")
    assert "better" in lines[1]
    assert lines[2].startswith("base")
    assert lines[-1].startswith("Better than base")


# Routing facts --------------------------------------------------------------------------------------------------------


def test_an_arm_has_the_mean_of_its_runs_routing_facts_and_no_mean_of_strangers() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1}, seeds=(0, 1))
    runs = [row["run"] for row in rows if row["arm"] == "good"]
    facts = {
        run: {
            "regret": {"router": 0.1 + at, "w2": None if at else 0.3}, "agreement": {"kinds": ["w2"], "tau": [[at]]},
            "co_activation_cosine": [[[1.0]]],
        }
        for at, run in enumerate(runs)
    }  # fmt: skip
    arms = analyse_rows(study, rows, facts)["arms"]
    assert arms["good"]["routing"] == {
        "regret": {"router": pytest.approx(0.6), "w2": 0.3}, "agreement": {"kinds": ["w2"], "tau": [[0.5]]},
    }  # fmt: skip
    assert arms["base"]["routing"] is None


def test_the_table_has_a_column_of_regret_where_it_is_known() -> None:
    study, rows = study_of({"base": 0.0, "good": -0.1})
    assert "regret" not in study_table(analyse_rows(study, rows))
    for row in rows:
        row["regret"] = 0.25
    head, line = study_table(analyse_rows(study, rows)).splitlines()[:2]
    assert "regret" in head
    assert "0.250" in line
