"""The 95 % interval of a difference of two settings: held-out pictures are a sample, and so are training seeds.

NumPy only. The two sources are added as Banerjee (1960, Sankhya 22, 357-358) adds them: each half-width at its own
degrees of freedom, squared. That covers at least 95 % however the two variances compare; adding the variances first
and approximating the degrees of freedom does not, when two seeds happen to agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_dag.evaluation.bootstrap import CONFIDENCE, Estimate
from lora_dag.evaluation.t_distribution import t_quantile


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
    return t_quantile(df, CONFIDENCE) * sd * math.sqrt(1 / num_a + 1 / num_b)
