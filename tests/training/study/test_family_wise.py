"""The error of a study as a whole: at most 5 % of simulated studies say anything false of one kind."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from training.study.analysis import decide, judge
from training.study.statistics import p_value

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
