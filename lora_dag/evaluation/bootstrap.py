"""Means over pictures and their 95 % intervals: a percentile bootstrap of whole pictures, of Student's width.

NumPy only, so that `compare` starts at once. The draws are keyed: the same values and seed give the same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lora_dag.core.seeding import key
from lora_dag.evaluation.t_distribution import t_quantile

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval, a percentile bootstrap of Student's width; NaN bounds where one picture cannot tell."""

    mean: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """As a metrics.json has it: ``name``, ``name_low`` and ``name_high``."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else float("nan")


def by_picture(values: Iterable[tuple[str, float]]) -> np.ndarray:
    """Mean of each picture's values, in order of first appearance: float64 [pictures]."""
    groups: dict[str, list[float]] = {}
    for file_name, value in values:
        groups.setdefault(file_name, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)


def estimate(values: np.ndarray, seed: int) -> Estimate:
    """Mean of per-picture values with the bootstrap interval over pictures, of Student's width where they are few.

    Rows of one picture are not independent, so whole pictures are drawn. Source: Efron & Tibshirani (1993), ch. 13.
    """
    return Estimate(mean(values), *bounds(resampled_means(values, seed, "values")))


def difference(a: np.ndarray, b: np.ndarray, seed: int) -> Estimate:
    """Mean of ``a`` minus mean of ``b``, two sets of other pictures, each resampled on its own."""
    means = resampled_means(a, seed, "a") - resampled_means(b, seed, "b")
    return Estimate(mean(a) - mean(b), *bounds(means))


def resampled_means(values: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """float64 [NUM_RESAMPLES]; NaN where there are fewer than two values.

    Bootstrap means vary less than means do, by sqrt((n - 1) / n) and by z over Student's t, so they are stretched by
    that about their centre. Source: Hesterberg (2015), doi:10.1080/00031305.2015.1089789, "narrowness bias".
    """
    n = len(values)
    if n < 2:
        return np.full(NUM_RESAMPLES, np.nan)
    rng = np.random.default_rng(key(seed, "bootstrap", purpose))
    means = values[rng.integers(n, size=(NUM_RESAMPLES, n))].mean(axis=1)
    stretch = t_quantile(n - 1, CONFIDENCE) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(n / (n - 1))
    return values.mean() + stretch * (means - values.mean())


def bounds(means: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
