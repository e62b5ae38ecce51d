"""What the table of pictures says of a picture and the size that the model sees it at."""

from __future__ import annotations

import pytest

from lora_dag.artifacts.picture_table import MAX_CUT, cut_off, enlargement


def test_enlargement_is_of_the_side_that_needs_most() -> None:
    assert enlargement(100, 50, (100, 100)) == 2
    assert enlargement(400, 200, (100, 100)) == 0.5


def test_a_square_of_a_camera_s_picture_loses_a_third_and_is_not_warned_of() -> None:
    assert cut_off(300, 200, (64, 64)) == pytest.approx(1 / 3) and cut_off(300, 200, (64, 64)) < MAX_CUT
    assert cut_off(400, 200, (64, 64)) == pytest.approx(1 / 2)
    assert cut_off(128, 64, (64, 32)) == 0
