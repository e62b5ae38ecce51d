"""The 95 % interval of a difference of two settings: held-out pictures are a sample, and so are training seeds.

NumPy only. The two sources are added as Banerjee (1960, Sankhya 22, 357-358) adds them: each half-width at its own
degrees of freedom, squared. That covers at least 95 % however the two variances compare; adding the variances first
and approximating the degrees of freedom does not, when two seeds happen to agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from stages.core import evaluation
from stages.core.evaluation import CONFIDENCE, Estimate

UPPER = 1 - (1 - CONFIDENCE) / 2


def over_pictures(differences: np.ndarray) -> Estimate:
    """Mean of per-picture differences, float64 [pictures], with its bootstrap interval; NaN bounds for one picture.

    A percentile interval is narrow by sqrt((n - 1) / n) and by z / t, so it is stretched by what is missing.
    Source: Hesterberg (2015), doi:10.1080/00031305.2015.1089789, "narrowness bias".
    """
    found, n = evaluation.estimate(differences, seed=0), len(differences)
    if n < 2:
        return found
    stretch = t_quantile(n - 1) / NormalDist().inv_cdf(UPPER) * math.sqrt(n / (n - 1))
    mean = found.mean
    return Estimate(mean, mean - stretch * (mean - found.low), mean + stretch * (found.high - mean))


def widened(pictures: Estimate, seeds: float) -> Estimate:
    """An interval over pictures, widened by the half-width over training seeds."""
    mean = pictures.mean
    low, high = math.hypot(mean - pictures.low, seeds), math.hypot(pictures.high - mean, seeds)
    return Estimate(mean, mean - low, mean + high)


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation between the repeats of a setting, pooled over settings, and its degrees of freedom.

    It takes for granted that another seed moves the loss of every setting as much.

    Args:
        groups: a mean loss per repeat, for each setting; one without repeats says nothing.

    Returns:
        NaN and 0 where no setting was repeated.
    """
    df = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def over_seeds(sd: float, df: int, num_a: int, num_b: int) -> float:
    """Half-width of the interval of a difference of means over ``num_a`` and ``num_b`` runs."""
    return t_quantile(df) * sd * math.sqrt(1 / num_a + 1 / num_b)


def t_quantile(df: int) -> float:
    """Student's t that is exceeded in half of 1 - CONFIDENCE, by bisection."""
    low, high = 1.0, 16.0  # 12.7 with one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < CONFIDENCE else (low, middle)
    return low


def inside(t: float, df: int) -> float:
    """P(-t < T < t). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    area = math.sin(angle) * total
    return 2 / math.pi * (angle + area) if odd else area
