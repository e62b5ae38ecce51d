"""Chroma and dark share."""

from __future__ import annotations

import numpy as np
import pytest

from lora_dag.images.color_measures import chroma, dark_share


def test_measures_use_only_the_foreground() -> None:
    array = np.full((10, 10, 3), 255, np.uint8)
    array[:, :2] = (200, 100, 50)
    array[:, 2:4] = (10, 10, 30)
    assert chroma(array) == pytest.approx((150 + 20) / 2)
    assert dark_share(array) == pytest.approx(0.5)
    assert chroma(array[:, :2]) == pytest.approx(150)


def test_measures_at_their_edges() -> None:
    blank = np.full((4, 4, 3), 240, np.uint8)
    assert (chroma(blank), dark_share(blank)) == (0.0, 0.0)
    assert chroma(np.full((1, 1, 3), (255, 255, 239), np.uint8)) == 16
    assert dark_share(np.full((1, 1, 3), 63, np.uint8)) == 1
    assert dark_share(np.full((1, 1, 3), 64, np.uint8)) == 0
