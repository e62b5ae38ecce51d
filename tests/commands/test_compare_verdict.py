"""Planted cases: runs of known settings and seeds, drawn many times, and how often the verdict is right."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lora_dag.commands.compare.interval import over_seeds, pooled_sd, widened
from lora_dag.commands.compare.page import paragraph
from lora_dag.commands.compare.revision_report import RevisionReport
from lora_dag.commands.compare.run_inputs import differing_params, setting
from lora_dag.commands.compare.verdict import judge
from lora_dag.evaluation.bootstrap import Estimate, estimate
from lora_dag.evaluation.t_distribution import t_quantile
from tests.helpers.revision_reports import side

LOSS, IMAGES = 0.42, 0.15  # mean held-out loss, and how it varies between images: the demo's
SEED, SEED_OF_IMAGE = 0.004, 0.009  # what a seed moves: the loss of all images (1 %), and of each


def runs(
    rng: np.random.Generator, images: np.ndarray, alpha: int, worse: float, num_seeds: int
) -> list[RevisionReport]:
    """A setting under several seeds, its true loss ``worse`` above that of the others."""
    shape = (num_seeds, len(images))
    losses = images + worse + rng.normal(0, SEED, (num_seeds, 1)) + rng.normal(0, SEED_OF_IMAGE, shape)
    return [side(losses[seed], alpha, seed) for seed in range(num_seeds)]


def count_words(worse: float, num_a: int, num_b: int, num_images: int = 25) -> Counter[str]:
    """Verdicts of 100 draws of two settings."""
    found: Counter[str] = Counter()
    for draw in range(100):
        rng = np.random.default_rng(draw)
        images = rng.normal(LOSS, IMAGES, num_images)
        a, *of_a = runs(rng, images, 8, 0, num_a)
        b, *of_b = runs(rng, images, 16, worse, num_b)
        found[judge(a, b, [*of_a, *of_b]).word] += 1
    return found


@pytest.mark.parametrize(("num_a", "num_b", "num_images"), [(2, 2, 25), (3, 2, 25), (3, 3, 25), (2, 2, 6), (3, 1, 25)])
def test_settings_that_are_as_good_are_within_noise(num_a: int, num_b: int, num_images: int) -> None:
    assert count_words(0, num_a, num_b, num_images)["within noise"] >= 95


@pytest.mark.parametrize(("num_a", "num_b"), [(2, 3), (3, 3)])
def test_a_truly_worse_one_is_found_worse(num_a: int, num_b: int) -> None:
    assert count_words(0.08 * LOSS, num_a, num_b)["worse"] >= 95
    assert count_words(-0.08 * LOSS, num_a, num_b)["better"] >= 95


def test_one_seed_each_takes_seed_noise_for_a_difference() -> None:
    """The page notes it and suggests repeats."""
    assert count_words(0, 1, 1)["within noise"] < 80
    rng = np.random.default_rng(0)
    (a,), (b,) = runs(rng, np.full(25, LOSS), 8, 0, 1), runs(rng, np.full(25, LOSS), 16, 0.1, 1)
    verdict = judge(a, b)
    assert (verdict.word, verdict.df) == ("worse", 0)
    assert "**Seed noise is not in the interval**: no setting was run with a second seed." in paragraph(a, b, verdict)


def test_repeats_of_any_setting_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    (a,), (b,), others = (runs(rng, np.full(25, LOSS), *args) for args in ((8, 0, 1), (16, 0.1, 1), (4, 0, 3)))
    alone, known = judge(a, b), judge(a, b, others)
    assert known.df == 2 and known.runs == (("alpha-8-0",), ("alpha-16-0",))
    assert known.change.low < alone.change.low and known.change.high > alone.change.high
    assert "Seed noise" not in paragraph(a, b, known)


def test_runs_that_differ_in_the_seed_alone_are_never_better() -> None:
    a, b = side([0.4] * 9), side([0.1] * 9, seed=1)
    verdict = judge(a, b)
    assert (verdict.word, verdict.same_setting, verdict.df) == ("within noise", True, 1)
    assert verdict.seed_sd == pytest.approx(np.std([0.4, 0.1], ddof=1))
    others = [side([0.4 + 1e-4 * i] * 9, seed=2 + i) for i in range(20)]
    assert judge(a, b, others).word == "within noise"  # though it lies far outside of the others


def lora(**section: Any) -> RevisionReport:
    changed = {f"lora.{name}": value for name, value in section.items()}
    return dataclasses.replace(side([0.4, 0.5]), params={"train.seed": 0} | changed)


def test_alpha_null_is_the_setting_of_the_rank_written_out() -> None:
    null, eight = lora(rank=8, alpha=None), lora(rank=8, alpha=8)
    assert setting(null) == setting(eight) and differing_params(null, eight) == []
    assert setting(null) != setting(lora(rank=8, alpha=4)) and differing_params(null, lora(rank=8, alpha=4)) == [
        "lora.alpha"
    ]
    assert differing_params(null, lora(rank=16, alpha=None)) == ["lora.rank"]
    assert differing_params(null, lora(rank=16, alpha=8)) == ["lora.alpha", "lora.rank"]  # null would be 16 there
    of_ranks = {"rank": 8, "rank_pattern.attn2.to_k": 4}
    assert setting(lora(alpha=None, **of_ranks)) != setting(lora(alpha=8, **of_ranks))
    written_out = lora(alpha=8, **of_ranks, **{"alpha_pattern.attn2.to_k": 4})
    assert differing_params(lora(alpha=None, **of_ranks), written_out) == []


def test_a_second_run_of_one_seed_is_no_repeat() -> None:
    a, b = side([0.4, 0.5]), side([0.1, 0.2], alpha=16)
    assert judge(a, b, [side([0.41, 0.52], name="again")]).df == 0


def test_a_repeat_that_lacks_shared_rows_is_left_out() -> None:
    a, b = side([0.4, 0.5, 0.6]), side([0.1, 0.2, 0.4], alpha=16)
    assert judge(a, b, [side([0.41, 0.52], seed=1)]).df == 0
    assert judge(a, b, [side([0.41, 0.52, 0.6, 0.7], seed=1)]).df == 1


def test_losses_that_are_no_numbers_are_not_compared() -> None:
    a, b = side([0.4, 0.5]), side([0.1, float("nan")], alpha=16, name="diverged")
    assert str(judge(a, b)) == "not comparable: a held-out loss of diverged is not a number"
    assert judge(a, side([0.1, 0.2], alpha=16), [side([float("inf"), 0.1], seed=1)]).df == 0


def test_percent_is_of_the_first_ones_loss() -> None:
    verdict = judge(side([0.5, 0.3]), side([0.48, 0.28], alpha=16))
    assert str(verdict) == "better, −5.0 % [−5.0, −5.0], with one seed each"
    assert (verdict.loss, verdict.num_images, verdict.num_each) == (pytest.approx(0.4), 2, (2, 2))


# The interval


def test_t_quantile_is_the_tables() -> None:
    """97.5 % quantiles, any statistics book."""
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 24: 2.0639, 63: 1.9983, 120: 1.9799}
    assert {df: round(t_quantile(df, 0.95), 4) for df in table} == table


def test_interval_over_images_is_as_wide_as_students() -> None:
    """The plain bootstrap's would be narrower by a third at five images."""
    for n in (5, 25, 200):
        values = np.random.default_rng(n).normal(size=n)
        found = estimate(values, seed=0)
        half = t_quantile(n - 1, 0.95) * values.std(ddof=1) / n**0.5
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.12)
    assert np.isnan(estimate(np.array([1.0]), seed=0).low)


def test_seeds_and_images_add_as_squares() -> None:
    assert widened(Estimate(1.0, -2.0, 5.0), 4.0) == Estimate(1.0, -4.0, 1 + 32**0.5)
    assert widened(Estimate(1.0, 0.0, 2.0), 0.0) == Estimate(1.0, 0.0, 2.0)


def test_pooled_deviation_is_the_analysis_of_variances() -> None:
    sd, df = pooled_sd([[1.0, 2.0, 4.0], [7.0, 7.5], [3.0]])
    squares = sum((v - 7 / 3) ** 2 for v in (1, 2, 4)) + 2 * 0.25**2
    assert (sd, df) == (pytest.approx((squares / 3) ** 0.5), 3)
    assert over_seeds(sd, df, 3, 2) == pytest.approx(3.18245 * sd * (1 / 3 + 1 / 2) ** 0.5, rel=1e-5)
    assert pooled_sd([[1.0], [2.0]])[1] == 0
