"""Effective speed-up: steps that the baseline needs for an arm's final loss, as a share of the arm's own steps.

    speed-up = t_b(L_a) / T_a        more than 1: the baseline would have to train longer; less: not even so long

L_a is the arm's last held-out score during its run, made after T_a steps, and t_b the inverse of the held-out curve of
the baseline's run of the same seed, scored on the same text. The curve is made monotone (isotonic regression), and is
linear in log(steps) between two scores. Below its last score it is not known: then `at_least` is what was measured, and
the estimate follows the least-squares line through the scores of the last half of the steps, over log(steps), up to
FARTHEST times as many steps. The mean over seeds is geometric, its interval a t-interval of the logarithms.

A curve of a run whose learning rate decays is above what shorter runs with a decay of their own would reach, so that a
slower arm looks faster than it is; and it falls steeply at the end, so that what is extrapolated understates.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from training.study.comparison.statistics import t_interval

FARTHEST = 4.0  # times the baseline's steps; beyond it a line says nothing
Scores = Sequence[tuple[int | float, float]]  # steps, rising, and the held-out nats per token after them


class Needed(NamedTuple):
    """Steps that a curve needs for a loss."""

    steps: float  # infinite where no number can be given
    measured: float  # the same, but no more steps than the run had: less than this are not enough
    early: bool = False  # the first score is below the loss already: `steps` are then more than enough

    @property
    def is_reached(self) -> bool:
        """True if the run got there."""
        return self.steps == self.measured


def steps_needed(curve: Scores, loss: float) -> Needed:
    """The steps after which a held-out curve is down at a loss; `curve` has two scores or more."""
    steps, raw = (np.asarray(column, dtype=float) for column in zip(*curve, strict=True))
    at, fit = np.log(steps), monotone(raw)
    last = float(steps[-1])
    if loss >= fit[0]:
        return Needed(float(steps[0]), float(steps[0]), early=loss > fit[0])
    if loss < fit[-1]:
        recent = steps >= last / 2 if (steps >= last / 2).sum() > 1 else steps >= steps[-2]
        slope = float(np.polyfit(at[recent], raw[recent], 1)[0])
        beyond = (loss - float(fit[-1])) / slope if slope < 0 else math.inf
        return Needed(last * math.exp(beyond) if beyond <= math.log(FARTHEST) else math.inf, last)
    first = int(np.argmax(fit <= loss))  # of several alike, the earliest
    share = (fit[first - 1] - loss) / (fit[first - 1] - fit[first])
    reached = float(np.exp(at[first - 1] + share * (at[first] - at[first - 1])))
    return Needed(reached, reached)


def monotone(values: Float[np.ndarray, " scores"]) -> Float[np.ndarray, " scores"]:
    """The values that never rise and are nearest in the sum of squares (isotonic regression)."""
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(values, increasing=False).x)


def effective_speedup(ours: Sequence[Scores], theirs: Sequence[Scores]) -> dict[str, Any] | None:
    """Speed-up of paired runs against the baseline's; None without a pair of curves.

    `estimate` is the geometric mean, with `low` and `high` over seeds; None where a pair has none. `at_least` is the
    mean of what was measured, `reached` the number of pairs where the baseline got there, of `n`; `early` where its
    first score was lower already, so that the pair's value is too large.
    """
    pairs = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine and len(other) > 1]
    if not pairs:
        return None
    needed = [(steps_needed(other, mine[-1][1]), mine[-1][0]) for mine, other in pairs]
    logs = [math.log(of.steps / steps) for of, steps in needed]
    known = all(map(math.isfinite, logs))
    _, low, high = t_interval(logs) if known else (None, None, None)
    return {
        "estimate": math.exp(fmean(logs)) if known else None,
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
        "at_least": math.exp(fmean(math.log(of.measured / steps) for of, steps in needed)),
        "reached": sum(of.is_reached for of, _ in needed),
        "early": sum(of.early for of, _ in needed),
        "n": len(needed),
    }
