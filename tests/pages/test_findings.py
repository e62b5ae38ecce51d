"""Chance, as the headline counts it, against draws; clauses of runs that measured less."""

from __future__ import annotations

import numpy as np
import pytest

from lora_dag.commands.leaderboard.page import percent
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pages import findings
from lora_dag.pages.findings import Share
from lora_dag.pages.markdown import decimals, interval, plain, signed
from stages.validate.neighbours import Neighbours


@pytest.mark.parametrize(("num_heldout", "size"), [(5, 24), (25, 24), (60, 48)])
def test_so_many_samples_are_that_near_by_chance_as_drawn(num_heldout: int, size: int) -> None:
    """Samples drawn as held-out pictures are, beside held-out pictures that set the limit."""
    rng = np.random.default_rng(0)
    counts = []
    for drawn in rng.normal(size=(4000, num_heldout + size)):
        found = Neighbours([], [], drawn[:num_heldout], (1.0, 1.0), 9)
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


def test_an_older_run_that_does_not_say_how_many_it_drew_has_a_share() -> None:
    lineage = {"validate": {}, "neighbours": {"num_heldout": 25}}
    (clause,) = findings.crossed({"samples.copied_share": 0.25, "samples.copied_share_base": 0.0}, lineage)
    assert clause == "25 % of the samples count as copies of training pictures (5 % by chance, the base's 0 %)"
    assert findings.crossed({}, {"validate": {}}) == [] and findings.overfits({}, 4) == ""


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


def test_the_cure_for_few_pictures_is_of_what_limits_them() -> None:
    limited = {"dataset": {"heldout": 40, "train": 360}, "table": {"num_pictures": {"heldout": 4}}}
    assert findings.cannot_tell(4, limited) == "4 held-out pictures cannot tell; set validate.max_pictures=40"
    shared = limited | {"table": {"num_pictures": {"heldout": 40}}}  # by another revision, which holds out others
    assert findings.cannot_tell(4, shared) == "4 held-out pictures cannot tell; set dataset.heldout_fraction=0.15"
    assert findings.cannot_tell(4, shared, is_named=True) == "4 held-out pictures cannot tell; hold out more pictures"
