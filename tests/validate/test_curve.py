"""Best snapshot and overfitting onset, on losses where both are known."""

from __future__ import annotations

import numpy as np
import pytest

from stages.validate import curve


def losses(*means: float, num_images: int = 30, spread: float = 0.01) -> dict[int, np.ndarray]:
    """Step -> per-image losses: images differ much, and move together up to ``spread``."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, num_images)
    noise = [rng.normal(0, spread, num_images) for _ in means]
    return {
        50 * index: images + mean + (own - own.mean())
        for index, (mean, own) in enumerate(zip(means, noise, strict=True))
    }


FALLING = losses(0.9, 0.5, 0.4, 0.3, 0.2)


@pytest.mark.parametrize(
    ("heldout", "probe", "onset"),
    [
        ((0.9, 0.5, 0.45, 0.5, 0.55), FALLING, 150),  # turns after step 100
        ((0.9, 0.45, 0.451, 0.5, 0.55), FALLING, 150),  # 0.001 above the minimum is inside of the interval
        ((0.9, 0.5, 0.45, 0.44, 0.55), FALLING, None),  # one snapshot alone may be bad luck
        ((0.9, 0.5, 0.45, 0.55, 0.451), FALLING, None),  # it came back
        ((0.9, 0.5, 0.45, 0.44, 0.43), FALLING, None),  # the last is the best
        ((0.9, 0.5, 0.45, 0.5, 0.55), losses(0.9, 0.5, 0.4, 0.5, 0.6), None),  # the probe rises too: it diverges
        ((0.5, 0.9, 0.9, 0.9, 0.9), FALLING, 50),  # the base is best
    ],
)
def test_onset(heldout: tuple[float, ...], probe: dict[int, np.ndarray], onset: int | None) -> None:
    assert curve.onset_step(curve.make_curve(losses(*heldout), probe, seed=0)) == onset


def test_final_minus_best_is_paired() -> None:
    """Images differ by up to 1, so that an interval which is not paired would be 0.2 wide."""
    heldout = losses(0.9, 0.5, 0.45, 0.5)
    measured = curve.metrics(curve.make_curve(heldout, FALLING, seed=0))
    difference = heldout[150] - heldout[100]
    margin = 1.96 * difference.std() / np.sqrt(len(difference))
    assert measured["val.best_step"] == 100
    assert measured["val.final_minus_best"] == pytest.approx(0.05)
    for bound, sign in (("low", -1), ("high", 1)):
        assert measured[f"val.final_minus_best_{bound}"] == pytest.approx(0.05 + sign * margin, abs=0.1 * margin)


def test_one_image_has_a_best_step_and_no_onset() -> None:
    points = curve.make_curve(losses(0.9, 0.4, 0.5, num_images=1), losses(0.9, 0.4, 0.3, num_images=1), seed=0)
    measured = curve.metrics(points)
    assert (measured["val.best_step"], measured["val.onset_step"]) == (50, None)
    assert curve.to_csv(points).splitlines()[3].endswith(",nan,nan")
