"""Means over images with 95 % intervals: a percentile bootstrap of whole images, stretched to Student's width.

Only NumPy is imported, so that `compare` starts fast. The same values and seed give the same bounds.
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
    """A mean with its 95 % interval. The bounds are NaN with fewer than two images."""

    mean: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """Return the estimate as metrics: ``name``, ``name_low`` and ``name_high``."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def mean(values: Iterable[float]) -> float:
    """Return the mean; NaN without values."""
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else float("nan")


def by_image(values: Iterable[tuple[str, float]]) -> np.ndarray:
    """Return the mean of each image's values, in order of first appearance: float64 [images]."""
    groups: dict[str, list[float]] = {}
    for file_name, value in values:
        groups.setdefault(file_name, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)


def estimate(values: np.ndarray, seed: int) -> Estimate:
    """Return the mean of per-image values with its bootstrap interval over images.

    Rows of one image are not independent, so whole images are resampled. Source: Efron & Tibshirani (1993), ch. 13.
    """
    return Estimate(mean(values), *bounds(resampled_means(values, seed, "values")))


def difference(a: np.ndarray, b: np.ndarray, seed: int) -> Estimate:
    """Return the mean of ``a`` minus the mean of ``b``, two sets of different images that are resampled separately."""
    means = resampled_means(a, seed, "a") - resampled_means(b, seed, "b")
    return Estimate(mean(a) - mean(b), *bounds(means))


def resampled_means(values: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Return bootstrap means, float64 [NUM_RESAMPLES]; NaN with fewer than two values.

    Bootstrap means vary less than the mean itself, by the factors sqrt((n - 1) / n) and z / t. They are stretched
    about their center by the inverse. Source: Hesterberg (2015), doi:10.1080/00031305.2015.1089789, "narrowness bias".
    """
    n = len(values)
    if n < 2:
        return np.full(NUM_RESAMPLES, np.nan)
    rng = np.random.default_rng(key(seed, "bootstrap", purpose))
    means = values[rng.integers(n, size=(NUM_RESAMPLES, n))].mean(axis=1)
    stretch = t_quantile(n - 1, CONFIDENCE) / NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(n / (n - 1))
    return values.mean() + stretch * (means - values.mean())


def bounds(means: np.ndarray) -> tuple[float, float]:
    """Return the two quantiles that enclose CONFIDENCE of the means."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
