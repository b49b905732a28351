"""Statistics of paired differences: t-intervals, paired t-tests, equivalence (TOST), Holm's correction."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its t-interval; no bounds with fewer than two values."""

    mean: float
    low: float | None
    high: float | None


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean +- t_{n - 1} * s / sqrt(n)."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    half = _student(len(values) - 1).ppf((1 + confidence) / 2).item() * _standard_error(values)
    return Interval(mean, mean - half, mean + half)


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of paired differences with mean zero; None with fewer than two of them."""
    if len(differences) < 2:
        return None
    t = _ratio(fmean(differences), _standard_error(differences))
    return min(1.0, 2 * _student(len(differences) - 1).cdf(-abs(t)).item())


def tost(differences: Sequence[float], margin: float) -> float | None:
    """p of "the mean difference is outside (-margin, margin)", the larger of two one-sided ones (Schuirmann 1987)."""
    if len(differences) < 2:
        return None
    mean, error, student = fmean(differences), _standard_error(differences), _student(len(differences) - 1)
    return max(student.cdf(sign * _ratio(mean - sign * margin, error)).item() for sign in (1, -1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number, step down (Holm 1979)."""
    corrected, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = highest
    return corrected


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values))


def _student(df: int) -> Any:
    """Student's t distribution."""
    from scipy.stats import t

    return t(df)


def _ratio(value: float, error: float) -> float:
    """value / error; values that do not vary are beyond doubt, unless they are zero."""
    if error == 0:
        return math.copysign(math.inf, value) if value else 0.0
    return value / error
