"""Intervals over images, against independent references."""

from __future__ import annotations

import numpy as np
import pytest

from lora_dag.evaluation import bootstrap

STRETCH_OF_TWO = 12.70620 / 1.959964 * 2**0.5  # t over z at 1 degree of freedom, and the jackknife's


def test_interval_equals_the_normal_one_for_many_images() -> None:
    values = np.random.default_rng(0).normal(0.3, 2.0, size=400)
    estimate = bootstrap.estimate(values, seed=0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=half * 0.1)
    assert estimate.high == pytest.approx(values.mean() + half, abs=half * 0.1)


def test_interval_of_two_images_equals_the_enumerated_distribution() -> None:
    # Resamples of {0, 1}: means 0, 0.5, 1 with chances 1/4, 1/2, 1/4, so that the 2.5 and 97.5 % quantiles are 0 and 1,
    # half a unit off the mean; Student's t with one degree of freedom, and the variance over n - 1, stretch that.
    estimate = bootstrap.estimate(np.array([0.0, 1.0]), seed=0)
    half = 0.5 * STRETCH_OF_TWO
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    means = bootstrap.resampled_means(np.array([0.0, 1.0]), 0, "values")
    assert np.mean(means == 0.5) == pytest.approx(0.5, abs=0.04)


def test_interval_covers_the_true_mean_in_about_95_of_100_cases() -> None:
    rng = np.random.default_rng(1)
    samples = [rng.normal(0, 1, size=60) for _ in range(200)]
    estimates = [bootstrap.estimate(values, seed) for seed, values in enumerate(samples)]
    assert np.mean([e.low <= 0 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.05)


def test_difference_of_two_sets_has_the_independent_width() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, size=300), rng.normal(0, 3, size=500)
    estimate = bootstrap.difference(a, b, seed=0)
    half = 1.96 * np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert estimate.mean == pytest.approx(a.mean() - b.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.1)


def test_one_image_has_no_interval() -> None:
    estimate = bootstrap.estimate(np.array([0.3]), seed=0)
    assert estimate.mean == pytest.approx(0.3)
    assert np.isnan([estimate.low, estimate.high]).all()


def test_an_estimate_has_the_names_of_its_bounds() -> None:
    assert bootstrap.Estimate(0.5, 0.25, 1.0).named("val.gap") == {
        "val.gap": 0.5,
        "val.gap_low": 0.25,
        "val.gap_high": 1.0,
    }
