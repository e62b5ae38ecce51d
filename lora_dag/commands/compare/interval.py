"""Compute the 95 % interval of a difference of two settings over held-out images and training seeds.

The two sources of noise are added as by Banerjee (1960, Sankhya 22, 357-358): each half-width at its own degrees of
freedom, squared. The result covers at least 95 % for any ratio of the two variances. Adding the variances first, with
approximate degrees of freedom, covers less if two seeds happen to agree. Needs NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_dag.evaluation.bootstrap import CONFIDENCE, Estimate
from lora_dag.evaluation.t_distribution import t_quantile


def widened(images: Estimate, seeds: float) -> Estimate:
    """Widen an interval over images by the half-width over training seeds."""
    mean = images.mean
    low, high = math.hypot(mean - images.low, seeds), math.hypot(images.high - mean, seeds)
    return Estimate(mean, mean - low, mean + high)


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the standard deviation between repeats, pooled over settings, and its degrees of freedom.

    Assumes that the seed has the same effect on the loss of every setting.

    Args:
        groups: a mean loss per repeat, for each setting; settings without repeats add nothing.

    Returns:
        NaN and 0 if no setting was repeated.
    """
    df = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def over_seeds(sd: float, df: int, num_a: int, num_b: int) -> float:
    """Return the half-width of the interval of a difference of means over ``num_a`` and ``num_b`` runs."""
    return t_quantile(df, CONFIDENCE) * sd * math.sqrt(1 / num_a + 1 / num_b)
