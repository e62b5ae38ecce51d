"""Chance, as the headline counts it, against draws; clauses of runs that measured less."""

from __future__ import annotations

import numpy as np
import pytest

from lora_dag.commands.leaderboard.page import percent
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pages import findings
from lora_dag.pages.findings import Share
from lora_dag.pages.markdown import decimals, interval, plain, signed
from stages.validate.neighbors import Neighbors


@pytest.mark.parametrize(("num_heldout", "size"), [(5, 24), (25, 24), (60, 48)])
def test_so_many_samples_are_that_near_by_chance_as_drawn(num_heldout: int, size: int) -> None:
    """Samples drawn as held-out images are, beside held-out images that set the limit."""
    rng = np.random.default_rng(0)
    counts = []
    for drawn in rng.normal(size=(4000, num_heldout + size)):
        found = Neighbors([], [], drawn[:num_heldout], (1.0, 1.0), 9)
        counts.append(int((drawn[num_heldout:] < found.threshold).sum()))
    known = max(0.05, 1 / (num_heldout + 1))
    beyond = [count for count in range(size + 1) if Share(count / size, 0, known, size, num_heldout).is_beyond_chance]
    assert beyond == list(range(beyond[0], size + 1))
    assert np.mean([count >= beyond[0] for count in counts]) < 0.06
    assert np.mean([count >= beyond[0] - 1 for count in counts]) > 0.04
    assert np.mean(counts) / size == pytest.approx(known, rel=0.1)


def test_thousands_of_samples_are_counted_too() -> None:
    assert Share(0.2, 0, 0.05, 20_000, 200).is_beyond_chance
    assert not Share(0.05, 0, 0.05, 20_000, 200).is_beyond_chance


def test_a_run_without_a_number_of_samples_has_a_share() -> None:
    lineage = {"validate": {}, "neighbors": {"num_heldout": 25}}
    (clause,) = findings.concerns({"samples.copied_share": 0.25, "samples.copied_share_base": 0.0}, lineage)
    assert clause == "25 % of the samples count as copies of training images (5 % by chance, base: 0 %)"
    assert findings.concerns({}, {"validate": {}}) == [] and findings.overfitting({}, 4) == ""


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [
        (-0.00001, ".4f", "0.0000"),
        (0.0, ".1f", "0.0"),
        (-0.0, ".4g", "0"),
        (-0.4, ".0f", "0"),
        (0.012, ".4f", "+0.0120"),
    ],
)
def test_a_zero_has_no_sign(value: float, spec: str, shown: str) -> None:
    assert signed(value, spec) == shown and plain(-abs(value), spec).lstrip("\N{MINUS SIGN}") == shown.lstrip("+")
    assert plain(-0.0, spec)[:2] != "\N{MINUS SIGN}0"


def test_small_differences_keep_two_digits() -> None:
    assert interval(-4e-5, 2e-6, decimals(-4e-5, 2e-6, least=4)) == "[−0.000040, +0.000002]"
    assert decimals(0.0, float("nan"), least=4) == ".4f" and decimals(12.3, 0.1, least=1) == ".1f"
    assert percent(Estimate(-1e-4, -3e-4, 1e-4), 1.0) == "−0.010 % [−0.030, +0.010]"


def test_suggestion_for_few_images_raises_the_limit_in_effect() -> None:
    limited = {"dataset": {"heldout": 40, "train": 360}, "table": {"num_images": {"heldout": 4}}}
    assert findings.too_few_images(4, limited).endswith(" Set validate.max_images=40.")
    shared = limited | {"table": {"num_images": {"heldout": 40}}}  # by another revision, which holds out others
    assert findings.too_few_images(4, shared).endswith(" Set dataset.heldout_fraction=0.15.")
    assert findings.too_few_images(4, shared, is_named=True).endswith(" Hold out more images.")
