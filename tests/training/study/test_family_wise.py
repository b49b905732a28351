"""The error of a study as a whole: at most 5 % of simulated studies say anything false of one kind."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.training.study.test_analysis import at_every_point
from training.run.config import RunConfig
from training.study.analysis import analyse_rows, decide, judge
from training.study.comparison.statistics import p_value
from training.study.config import Arm, StudyConfig
from training.study.summary import empty_row

STUDIES, SEEDS, NOISE = 600, 5, 0.02
WIDE, NARROW = 10 * NOISE, NOISE / 10  # margins; within a wide one what is equal is found to be equivalent
TRUTHS = {"none": (0.0,), "margin": (WIDE, -WIDE), "both": (0.0, WIDE, 0.0, -WIDE)}  # of the arms in turn
MARGINS = {"none": NARROW, "margin": WIDE, "both": WIDE}
KINDS = ("different", "equivalent", "beyond")
Comparison = Mapping[str, Any]


def simulated(arms: int, points: int, orders: int, missing: bool, truth: str) -> dict[str, np.ndarray]:
    """Label -> (studies, pairs, orders) differences of an arm to the baseline, which all arms of a point share.

    Every run has luck of its arm at the seed, at the order of the tasks, and at both, each as large as the others. With
    missing runs the arms have five, four and three whole seeds in turn, and the last of several has none.
    """
    random, differences = np.random.default_rng([arms, points, orders, missing]), {}

    def luck() -> np.ndarray:
        shapes = [(SEEDS, 1), (SEEDS, orders)] + ([(1, orders)] if orders > 1 else [])
        return sum(random.normal(0, NOISE, (STUDIES, *shape)) for shape in shapes)

    for point in range(points):
        baseline = luck()
        for arm in range(arms):
            pairs = SEEDS - arm % 3 if missing else SEEDS
            pairs = 0 if missing and 0 < arm == arms - 1 else pairs
            differences[f"{arm} at {point}"] = (true_difference(arm, truth) + luck() - baseline)[:, :pairs]
    return differences


def true_difference(arm: int, truth: str) -> float:
    return TRUTHS[truth][arm % len(TRUTHS[truth])]


def compared(differences: Mapping[str, np.ndarray], margin: float) -> list[dict[str, Comparison]]:
    """For each study what is known of every label before it is decided: as in `judge`, but for all studies at once."""
    unknown = dict.fromkeys(("difference", "p", "tost_p", "beyond_p"), [None] * STUDIES)
    columns = {label: {**unknown} for label in differences}
    for pairs in {table.shape[1] for table in differences.values()} - {0}:
        labels = [label for label, table in differences.items() if table.shape[1] == pairs]
        tables = np.stack([differences[label] for label in labels])
        within = np.maximum(p_value(tables, margin, "less"), p_value(tables, -margin, "greater"))
        outside = np.minimum(p_value(tables, margin, "greater"), p_value(tables, -margin, "less"))
        statistics = {"difference": tables.mean(axis=(2, 3)), "p": p_value(tables), "tost_p": within}
        statistics["beyond_p"] = np.minimum(1.0, 2 * outside)
        for key, values in statistics.items():
            for label, column in zip(labels, values.tolist(), strict=True):
                columns[label][key] = column
    return [
        {label: {key: column[study] for key, column in known.items()} for label, known in columns.items()}
        for study in range(STUDIES)
    ]


def errors(pairs: Mapping[str, Comparison], truth: str) -> set[str]:
    """The kinds of false statements of a study that has been decided."""
    kinds = set()
    for label, pair in pairs.items():
        true = true_difference(int(label.split()[0]), truth)
        if true == 0 and pair["verdict"] in ("better", "worse"):
            kinds.add("different")
        if true != 0 and pair["verdict"] == {-1.0: "worse", 1.0: "better"}[np.sign(true)]:
            kinds.add("different")  # on the wrong side
        if true != 0 and pair["verdict"] == "equivalent":
            kinds.add("equivalent")
        if pair["beyond_margin"]:
            kinds.add("beyond")
    return kinds


def lowest_error(count: int) -> float:
    """The lower end of the 99 % interval of the error that `count` studies of STUDIES made."""
    return binomtest(count, STUDIES).proportion_ci(0.99).low


FAMILIES = [(1, 1), (5, 1), (14, 1), (3, 4)]  # arms, points of the axes


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
@pytest.mark.parametrize("orders", [1, 3])
@pytest.mark.parametrize(("arms", "points"), FAMILIES)
def test_at_most_five_percent_of_studies_have_a_false_verdict(
    arms: int, points: int, orders: int, missing: bool
) -> None:
    for truth in TRUTHS:
        studies = compared(simulated(arms, points, orders, missing, truth), MARGINS[truth])
        counts = Counter(kind for pairs in studies for kind in errors(decide(pairs), truth))
        for kind in KINDS:
            assert lowest_error(counts[kind]) <= 0.05, f"{truth}: {kind} in {counts[kind] / STUDIES:.1%} of studies"


def test_the_simulation_sees_what_is_not_corrected_or_not_independent() -> None:
    """The negative twins: one arm at a time, one point of the axes at a time, seeds x orders as if all were pairs."""
    for truth, kind in (("none", "different"), ("margin", "equivalent")):
        studies = compared(simulated(14, 1, 1, False, truth), MARGINS[truth])
        alone = sum(any(errors(decide({k: v}), truth) for k, v in pairs.items()) for pairs in studies[:200])
        assert alone / 200 > 0.2, f"{kind}, not corrected"
    studies = compared(simulated(3, 4, 1, False, "none"), NARROW)
    by_point = 0
    for pairs in studies:
        points = ({k: v for k, v in pairs.items() if k.endswith(str(point))} for point in range(4))
        by_point += any("different" in errors(decide(at_point), "none") for at_point in points)
    assert lowest_error(by_point) > 0.07
    crossed = simulated(1, 1, 3, False, "none")["0 at 0"]
    pooled = p_value(crossed.reshape(STUDIES, -1, 1)) < 0.05
    assert lowest_error(int(pooled.sum())) > 0.15
    assert lowest_error(int((p_value(crossed.mean(axis=2, keepdims=True)) < 0.05).sum())) > 0.07, "orders differ, too"


# Tuning ---------------------------------------------------------------------------------------------------------------

POINTS = 8
RATES = tuple(0.001 * (1 + point) for point in range(POINTS))


def tuned_scores(arms: int, blind: bool, truth: str) -> np.ndarray:
    """(studies, baseline and arms, points, seeds) scores: luck of the text at the seed, and of each run.

    The second half of the seeds is there to tune on. A blind baseline does not depend on the axis: its points are one
    run. No point is better than another, so that the best one is that of the most luck.
    """
    random = np.random.default_rng([arms, blind])
    scores = random.normal(0, NOISE, (STUDIES, 1 + arms, POINTS, 2 * SEEDS))
    if blind:
        scores[:, 0] = scores[:, 0, :1]
    for arm in range(arms):
        scores[:, 1 + arm] += true_difference(arm, truth)
    return scores + random.normal(0, 2 * NOISE, (STUDIES, 1, 1, 2 * SEEDS))


def tuned_differences(scores: np.ndarray, apart: bool) -> dict[str, np.ndarray]:
    """Label -> (studies, pairs, 1) of each arm's best point to the baseline's; chosen on other seeds where `apart`."""
    judges = scores[..., SEEDS:] if apart else scores[..., :SEEDS]
    best = judges.mean(axis=-1).argmin(axis=-1)
    chosen = np.take_along_axis(scores[..., :SEEDS], best[..., None, None], axis=2).squeeze(2)
    return {f"{arm} tuned": (chosen[:, 1 + arm] - chosen[:, 0])[..., None] for arm in range(chosen.shape[1] - 1)}


@pytest.mark.parametrize("apart", [True, False], ids=["tune_seeds", "shared seeds"])
@pytest.mark.parametrize("blind", [True, False], ids=["blind", "both tuned"])
@pytest.mark.parametrize("arms", [1, 4])
def test_a_tuned_study_has_no_more_false_verdicts(arms: int, blind: bool, apart: bool) -> None:
    tried = {} if apart else {f"{arm} tuned": POINTS * POINTS for arm in range(arms)}
    for truth in TRUTHS:
        studies = compared(tuned_differences(tuned_scores(arms, blind, truth), apart), MARGINS[truth])
        counts = Counter(kind for pairs in studies for kind in errors(decide(pairs, (), tried), truth))
        for kind in KINDS:
            assert lowest_error(counts[kind]) <= 0.05, f"{truth}: {kind} in {counts[kind] / STUDIES:.1%} of studies"


def test_the_simulation_sees_that_runs_which_choose_a_point_are_no_test_of_it() -> None:
    """The negative twin: what was tried is not counted."""
    studies = compared(tuned_differences(tuned_scores(1, True, "none"), apart=False), NARROW)
    assert lowest_error(sum("different" in errors(decide(pairs), "none") for pairs in studies)) > 0.05


@pytest.mark.parametrize("apart", [True, False], ids=["tune_seeds", "shared seeds"])
def test_a_tuned_study_is_judged_as_the_simulated_ones(apart: bool) -> None:
    """analysis.json of a study, from its rows, says what the simulation decides from tables."""
    arms = tuple(Arm(str(arm), {"hyper.pi_gamma": 0.1 + arm / 100}) for arm in range(3))
    study = StudyConfig(
        "tuned", margin=WIDE, base=RunConfig(), arms=arms, axes={"hyper.lr": RATES}, tune=["hyper.lr"],
        seeds=range(SEEDS), tune_seeds=range(SEEDS, 2 * SEEDS) if apart else (),
    )  # fmt: skip
    scores, runs = tuned_scores(2, True, "both"), at_every_point(study)
    assert len(runs) == 3 * POINTS * SEEDS * (2 if apart else 1)
    for at, pairs in enumerate(compared(tuned_differences(scores, apart), WIDE)[:3]):
        rows = [
            empty_row(run)
            | {"nats_per_token": scores[at, int(run.arm), RATES.index(run.config.hyper.lr), run.seed] + 2.0}
            | {"status": "finished"}
            for run in runs
        ]
        analysis, tried = analyse_rows(study, rows), 1 if apart else POINTS * POINTS
        wanted = decide(pairs, (), {label: tried for label in pairs})
        for label, pair in wanted.items():
            judged = analysis["against_baseline"][str(int(label.split()[0]) + 1)]
            for key in ("verdict", "beyond_margin", "tried"):
                assert judged[key] == pair[key]
            for key in ("p", "p_holm", "tost_p", "tost_p_holm", "beyond_p_holm", "difference"):
                assert judged[key] == pytest.approx(pair[key], rel=1e-6, abs=1e-12)
        assert analysis["tuned_on"] == [*study.tune_seeds]
        assert bool(analysis["note"]) is not apart


@pytest.mark.parametrize("orders", [1, 3])
def test_a_study_is_judged_as_the_simulated_ones(orders: int) -> None:
    differences = simulated(5, 2, orders, True, "both")
    for study, pairs in enumerate(compared(differences, WIDE)[:5]):
        wanted, judged = decide(pairs), judge({k: table[study] for k, table in differences.items()}, WIDE)
        for label, pair in wanted.items():
            assert {key: judged[label][key] for key in pair} == {
                key: value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-9)
                for key, value in pair.items()
            }
