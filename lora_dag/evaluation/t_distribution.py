"""Quantiles of Student's t, from its series for whole degrees of freedom."""

from __future__ import annotations

import math
from functools import cache


@cache
def t_quantile(df: int, confidence: float) -> float:
    """Return the t with P(-t < T < t) = ``confidence`` for ``df`` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while central_probability(high, df) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle, df) < confidence else (low, middle)
    return low


def central_probability(t: float, df: int) -> float:
    """Return P(-t < T < t). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    area = math.sin(angle) * total
    return 2 / math.pi * (angle + area) if odd else area
