"""Statistics of paired differences: t-intervals, paired t-tests, equivalence (TOST), Holm's correction.

A pair is a seed, and its value one number; in a stream of tasks it is a row, one number for each order of the tasks,

    d[s, o] = effect + seed[s] + order[o] + rest[s, o]

All but the effect is drawn at random. The cells of a row have the seed's part in common, those of a column the order's,
so seeds x orders cells are not as many independent values. Where there are several orders, three t-tests have to agree:
that of the seeds' means, that of the orders' means, and Welch's with the variances of both added (the min F' of Clark
1973). Their largest p and the interval that spans theirs are what counts. Each alone says too often that there is an
effect: the first where orders matter, the first two where both matter and are many, the third far out in the tails,
where corrected tests live. With one order alone, what is said is said of that order.

A value that is not finite is none that varies: nothing is decided by values among which there is one.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
CONSTANT = 1e-12  # nats, of values up to 1: less is the rounding of a subtraction, scores have only seven digits
SURE = 3  # values without spread, but not zero, that are no coincidence; fewer decide nothing
EQUIVALENT = 3  # pairs that can show equivalence
Table = Float[np.ndarray, "*studies pairs orders"]
Values = Sequence[float] | Float[np.ndarray, "pairs orders"]
Alternative = Literal["two-sided", "less", "greater"]


class Interval(NamedTuple):
    """A mean and its t-interval; no bounds with fewer than two pairs, or two that are the same."""

    mean: float  # NaN where a value is not finite, and no bounds then
    low: float | None
    high: float | None


def t_interval(values: Values, confidence: float = CONFIDENCE) -> Interval:
    """mean +- t_{n - 1} * s / sqrt(n); of several orders, what spans the three intervals."""
    table = _table(values)
    mean = float(table.mean()) if np.isfinite(table).all() else math.nan
    if len(table) < 2 or math.isnan(mean):
        return Interval(mean, None, None)
    lows, highs = zip(*(test.confidence_interval(confidence) for test in _tests(table, 0.0, "two-sided")), strict=True)
    return Interval(mean, _known(np.min(lows)), _known(np.max(highs)))


def t_test(differences: Values) -> float | None:
    """Two-sided p of paired differences with mean zero; None with fewer than two pairs, or one that is not finite."""
    table = _table(differences)
    return None if len(table) < 2 else _known(p_value(table))


def tost(differences: Values, margin: float) -> float | None:
    """p of "the mean difference is outside (-margin, margin)", the larger of two one-sided ones (Schuirmann 1987).

    None with fewer than EQUIVALENT pairs: two that happen to be near each other would make a very small p. None, too,
    where one is not finite.
    """
    table = _table(differences)
    if len(table) < EQUIVALENT:
        return None
    return _known(np.maximum(p_value(table, -margin, "greater"), p_value(table, margin, "less")))


def beyond(differences: Values, margin: float) -> float | None:
    """Two-sided p of "the mean difference is inside [-margin, margin]"; None where `t_test` has none."""
    table = _table(differences)
    if len(table) < 2:
        return None
    one_sided = np.minimum(p_value(table, margin, "greater"), p_value(table, -margin, "less"))
    return _known(np.minimum(1.0, 2 * one_sided))


def p_value(table: Table, null: float = 0.0, alternative: Alternative = "two-sided") -> Float[np.ndarray, "*studies"]:
    """p of the mean being `null`; NaN where the values decide nothing, as those with NaN or infinity among them."""
    p, finite = np.full(table.shape[:-2], np.nan), np.isfinite(table).all(axis=(-2, -1))
    if finite.any():
        p[finite] = reduce(np.maximum, (test.pvalue for test in _tests(table[finite], null, alternative)))
    return p


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number, step down (Holm 1979)."""
    corrected, highest = {}, 0.0
    for name, factor in step_down(p_values).items():
        highest = max(highest, min(1.0, p_values[name] * factor))
        corrected[name] = highest
    return corrected


def step_down(p_values: Mapping[str, float]) -> dict[str, int]:
    """By how much Holm's method multiplies each p: the number of those that are not smaller."""
    ranked = sorted(p_values, key=lambda name: p_values[name])
    return {name: len(ranked) - rank for rank, name in enumerate(ranked)}


# Tests ----------------------------------------------------------------------------------------------------------------


class _Certain(NamedTuple):
    """The test of values that do not vary, for which scipy has a warning and NaN."""

    pvalue: float
    mean: float  # NaN where they decide nothing

    def confidence_interval(self, confidence_level: float) -> tuple[float, float]:
        return self.mean, self.mean


def _tests(table: Table, null: float, alternative: Alternative) -> list[Any]:
    """The t-tests that have to agree, as scipy's results."""
    from scipy.stats import ttest_ind

    seeds, orders = table.mean(axis=-1), table.mean(axis=-2)
    if table.shape[-1] == 1:
        return [_one_sample(seeds, null, alternative, SURE)]
    tests = [_one_sample(seeds, null, alternative, SURE), _one_sample(orders, null, alternative, 0)]
    if not any(isinstance(test, _Certain) for test in tests):
        deviations = orders - orders.mean(axis=-1, keepdims=True)
        tests.append(ttest_ind(seeds - null, deviations, axis=-1, equal_var=False, alternative=alternative))
    return tests


def _one_sample(values: Float[np.ndarray, "*studies n"], null: float, alternative: Alternative, sure: int) -> Any:
    """The t-test of the values' mean; of values that do not vary, `sure` of them decide something."""
    from scipy.stats import ttest_1samp

    if np.any(np.ptp(values, axis=-1) > CONSTANT * np.maximum(1.0, np.abs(values).max(axis=-1))):
        return ttest_1samp(values, null, axis=-1, alternative=alternative)
    mean = float(values.mean())
    if abs(mean) <= CONSTANT:
        mean = 0.0
    elif values.shape[-1] < sure:
        return _Certain(np.nan, np.nan)
    away = {"two-sided": mean != null, "less": mean < null, "greater": mean > null}[alternative]
    return _Certain(0.0 if away else 1.0, mean)


def _table(values: Values) -> Float[np.ndarray, "pairs orders"]:
    table = np.asarray(values, dtype=float)
    return table[:, None] if table.ndim == 1 else table


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
