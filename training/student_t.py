"""Student's t distribution: its distribution function and quantiles, from the regularised incomplete beta function."""

import math

ACCURACY = 1e-15  # relative, of the continued fraction
MOST_TERMS = 10_000
TINY = 1e-300


def t_cdf(t: float | int, df: float | int) -> float:
    """P(T <= t) for T of Student's t distribution with `df` > 0 degrees of freedom.

    P(T > |t|) = I_x(df / 2, 1 / 2) / 2 with x = df / (df + t^2).
    """
    if not df > 0:
        raise ValueError(f"t_cdf: expected df > 0, got {df}")
    square = t * t
    tail = 0.0 if math.isinf(square) else incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square)) / 2
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float | int) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1, by bisection."""
    if not 0 < p < 1:
        raise ValueError(f"t_quantile: expected 0 < p < 1, got {p}")
    tail, low, high = min(p, 1 - p), 0.0, 1.0
    while t_cdf(-high, df) > tail:
        low, high = high, 2 * high
    middle = (low + high) / 2
    while low < middle < high:
        low, high = (middle, high) if t_cdf(-middle, df) > tail else (low, middle)
        middle = (low + high) / 2
    return -middle if p < 0.5 else middle


def incomplete_beta(a: float | int, b: float | int, x: float, rest: float) -> float:
    """I_x(a, b), regularised: the share of the beta(a, b) distribution below x; `rest` = 1 - x, given with its digits.

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) / (1 + d1 / (1 + d2 / (1 + ...))), quick where x is below the mean, and
    I_x(a, b) = 1 - I_{1 - x}(b, a) elsewhere (Abramowitz and Stegun 26.5.8).
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, rest, x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    return math.exp(log_front) / a / _continued_fraction(a, b, x)


def _continued_fraction(a: float | int, b: float | int, x: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), from the front (modified Lentz): a product of ratios of convergents."""
    value = numerators = 1.0
    denominators = 0.0
    for term in range(1, MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominators = 1 / ((1 + d * denominators) or TINY)
        numerators = (1 + d / numerators) or TINY
        value *= numerators * denominators
        if abs(numerators * denominators - 1) < ACCURACY:
            break
    return value
