"""Scores and distances against double loops in float64, their bias and interval by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from stages.validate import distances


def unit(rng: np.random.Generator, count: int, size: int, shift: float = 0.0) -> np.ndarray:
    """Normal vectors around (shift, 1, 0, ...), scaled to length 1, float32."""
    drawn = rng.standard_normal((count, size))
    drawn[:, 0] += shift
    drawn[:, 1] += 1
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def gaussian(a: list[float], b: list[float]) -> float:
    return 1000 * math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10**2))


def cubic(a: list[float], b: list[float]) -> float:
    """The paper's, of vectors whose length is the root of their size."""
    size = len(a)
    dot = sum(p * math.sqrt(size) * q * math.sqrt(size) for p, q in zip(a, b, strict=True))
    return (dot / size + 1) ** 3


def mmd(kernel: Callable[[list[float], list[float]], float], x: list[list[float]], y: list[list[float]]) -> float:
    """Gretton et al. 2012, equation 3, term by term."""
    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


KERNELS = pytest.mark.parametrize(
    ("kernel", "loop"), [(distances.gaussian, gaussian), (distances.cubic, cubic)], ids=["cmmd", "kid"]
)


@KERNELS
@pytest.mark.parametrize("counts", [(2, 2), (3, 9), (8, 5)])
def test_distances_and_their_change_equal_a_double_loop(
    kernel: distances.Kernel, loop: Callable[[list[float], list[float]], float], counts: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    after, before, real = unit(rng, counts[0], 6, 1.0), unit(rng, counts[0], 6), unit(rng, counts[1], 6, 0.5)
    x, x_before, y = (features.astype(np.float64).tolist() for features in (after, before, real))
    assert distances.mmd(kernel, after, real) == pytest.approx(mmd(loop, x, y), rel=1e-9, abs=1e-9)
    change = distances.mmd_change(kernel, before, after, real)
    assert change.mean == pytest.approx(mmd(loop, x, y) - mmd(loop, x_before, y), rel=1e-9, abs=1e-9)

    if counts[0] < 3:
        assert math.isnan(change.low) and math.isnan(change.high)
        return
    indices = range(counts[0]), range(counts[1])
    by_prompt = [mmd(loop, x[:i] + x[i + 1 :], y) - mmd(loop, x_before[:i] + x_before[i + 1 :], y) for i in indices[0]]
    by_real = [mmd(loop, x, y[:j] + y[j + 1 :]) - mmd(loop, x_before, y[:j] + y[j + 1 :]) for j in indices[1]]
    variance = sum(
        (len(group) - 1) / len(group) * sum((v - np.mean(group)) ** 2 for v in group) for group in (by_prompt, by_real)
    )
    assert (change.low, change.high) == pytest.approx(
        (change.mean - 1.96 * math.sqrt(variance), change.mean + 1.96 * math.sqrt(variance)), rel=1e-6
    )


@KERNELS
def test_distances_of_two_draws_of_one_distribution_are_zero_on_average(
    kernel: distances.Kernel, loop: Callable[[list[float], list[float]], float]
) -> None:
    rng = np.random.default_rng(0)
    found = np.array([distances.mmd(kernel, unit(rng, 5, 8), unit(rng, 7, 8)) for _ in range(4000)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 3 * error
    kept = np.array([np.mean(kernel(x, x)) - np.mean(kernel(x, x)[~np.eye(5, dtype=bool)]) for x in [unit(rng, 5, 8)]])
    assert kept.mean() > 30 * error  # what the diagonal would add
    assert min(found) < 0 < max(found)


@KERNELS
def test_intervals_contain_the_true_change(
    kernel: distances.Kernel, loop: Callable[[list[float], list[float]], float]
) -> None:
    """Base and adapter share half of what differs from prompt to prompt."""
    rng = np.random.default_rng(0)

    def draw(prompts: np.ndarray, shift: float) -> np.ndarray:
        drawn = math.sqrt(0.5) * (prompts + rng.standard_normal(prompts.shape))
        drawn[:, 0] += shift
        drawn[:, 1] += 1
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    many = rng.standard_normal((2000, 16))
    real = unit(rng, 2000, 16, 1.0)
    truth = distances.mmd(kernel, draw(many, 0.7), real) - distances.mmd(kernel, draw(many, 0.0), real)
    held = 0
    for _ in range(300):
        prompts = rng.standard_normal((8, 16))
        change = distances.mmd_change(kernel, draw(prompts, 0.0), draw(prompts, 0.7), unit(rng, 27, 16, 1.0))
        held += change.low <= truth <= change.high
    assert 0.90 <= held / 300 < 1


def test_equal_samples_give_no_change() -> None:
    rng = np.random.default_rng(0)
    same, real = unit(rng, 4, 6), unit(rng, 5, 6)
    change = distances.mmd_change(distances.cubic, same, same, real)
    assert (change.mean, change.low, change.high) == (0, 0, 0)


def test_too_few_images_give_nan() -> None:
    rng = np.random.default_rng(0)
    one, few = unit(rng, 1, 6), unit(rng, 4, 6)
    assert math.isnan(distances.mmd(distances.cubic, one, few)) and math.isnan(distances.mmd(distances.cubic, few, one))
    assert math.isnan(distances.mmd_change(distances.cubic, one, one, few).mean)
    assert math.isnan(distances.mmd_change(distances.cubic, few, few, one).low)


def test_scores_equal_a_hand_computation() -> None:
    images = np.array([[1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    texts = np.array([[1, 0], [1, 0], [0, -1]], dtype=np.float32)
    assert distances.cosines(images, texts) == pytest.approx([1, 0.6, -1])
    assert distances.clip_scores(images, texts) == pytest.approx([100, 60, 0])
