"""The table of images: cropped fractions and enlargement."""

from __future__ import annotations

import pytest

from lora_dag.artifacts.image_table import MAX_CUT, cropped_fraction, enlargement


def test_enlargement_is_of_the_side_that_needs_most() -> None:
    assert enlargement(100, 50, (100, 100)) == 2
    assert enlargement(400, 200, (100, 100)) == 0.5


def test_a_square_of_a_camera_s_image_loses_a_third_and_is_not_warned_of() -> None:
    assert (
        cropped_fraction(300, 200, (64, 64)) == pytest.approx(1 / 3) and cropped_fraction(300, 200, (64, 64)) < MAX_CUT
    )
    assert cropped_fraction(400, 200, (64, 64)) == pytest.approx(1 / 2)
    assert cropped_fraction(128, 64, (64, 32)) == 0
