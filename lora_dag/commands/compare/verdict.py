"""Is B better than A? Both answer the same held-out rows, so their losses are paired, row by row.

Two things are random: which pictures are held out, and the training seed. The first is always in the interval, the
second where a setting was run under several seeds; where it was not, the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lora_dag.commands.compare.interval import over_seeds, pooled_sd, widened
from lora_dag.commands.compare.repeats import repeats_of
from lora_dag.commands.compare.settings import same_setting, setting
from lora_dag.commands.compare.sides import Side
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.heldout_table import Score
from lora_dag.pages.markdown import decimals, interval, signed

MIN_PICTURES = 2  # one has no interval
Word = Literal["better", "worse", "within noise", "equal", "not comparable"]
DECIDE_TARGETS = ("vae", "scheduler")  # of the base
DECIDE_ROWS = ("seed", "num_timesteps")  # of section validate


@dataclass(frozen=True)
class Verdict:
    """What the held-out pictures say of B against A, and no more."""

    word: Word
    why: str = ""
    """Of what cannot be compared."""
    loss: float = math.nan
    """Mean held-out loss of A's runs on the shared rows."""
    change: Estimate = Estimate(math.nan, math.nan, math.nan)
    """B's loss minus A's, with its 95 % interval."""
    num_pictures: int = 0
    """Held-out pictures that both were asked about,"""
    num_each: tuple[int, int] = (0, 0)
    """of A's and of B's."""
    runs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Names of the runs whose losses were averaged: A and its repeats, B and its repeats."""
    seed_sd: float = math.nan
    """Standard deviation of the loss between seeds; NaN where no setting was repeated."""
    df: int = 0
    """Degrees of freedom of it."""
    same_setting: bool = False
    """They differ in train.seed at most."""

    def __str__(self) -> str:
        """``better, −3.1 % [−4.0, −2.2]``, in percent of A's loss; one setting and seed twice have no interval."""
        if self.word == "not comparable":
            return f"not comparable: {self.why}"
        if self.word == "equal":
            return "equal: the held-out losses are the same to the last digit"
        change = percent(self.change, self.loss, has_bounds=bool(self.df) or not self.same_setting)
        once = ", with one seed each" if self.word in ("better", "worse") and not self.df else ""
        return f"{self.word}, {change}{once}"


def percent(change: Estimate, of: float, has_bounds: bool = True) -> str:
    """``−3.1 % [−4.0, −2.2]``; without bounds where one picture has none."""
    mean, low, high = (100 * value / of for value in (change.mean, change.low, change.high))
    spec = decimals(mean, low, high, least=1)
    return f"{signed(mean, spec)} %" + (f" {interval(low, high, spec)}" if has_bounds and low == low else "")


def judge(a: Side, b: Side, others: Sequence[Side] = ()) -> Verdict:
    """B against A, each averaged with its repeats.

    Args:
        others: more runs. Those that differ from A or B in train.seed alone are averaged with it; any that differ in
            that alone tell how much a seed matters.
    """
    by_position = not (a.scores[0].row and b.scores[0].row)
    answers = {id(side): heldout(side, by_position) for side in (a, b, *others)}
    shared = [row for row in answers[id(a)] if row in answers[id(b)]]
    pictures = [answers[id(a)][row].file_name for row in shared]
    if len(set(pictures)) < MIN_PICTURES:
        return Verdict("not comparable", why_not(a, b, len(set(pictures))), num_pictures=len(set(pictures)))
    losses = {}
    for side in (a, b, *others):
        if answers[id(side)].keys() >= set(shared):
            values = (answers[id(side)][row].adapter for row in shared)
            losses[id(side)] = bootstrap.by_picture(zip(pictures, values, strict=True))
    for side in (a, b):
        if not np.isfinite(losses[id(side)]).all():
            why = f"a held-out loss of {side.name} is not a number"
            return Verdict("not comparable", why, num_pictures=len(set(pictures)))
    num_a, num_b = (len({score.file_name for score in answers[id(side)].values()}) for side in (a, b))
    runs = [side for side in (a, b, *others) if np.isfinite(losses.get(id(side), np.nan)).all()]
    return replace(weigh(a, b, runs, losses), num_each=(num_a, num_b))


def heldout(side: Side, by_position: bool) -> dict[str, Score]:
    """Held-out rows by their names; by position in the table, which its digest names, where they have none."""
    named = ((f"{side.metrics.get('val.table')} {i}" if by_position else s.row, s) for i, s in enumerate(side.scores))
    return {name: score for name, score in named if score.split == "heldout"}


def weigh(a: Side, b: Side, runs: Sequence[Side], losses: Mapping[int, np.ndarray]) -> Verdict:
    """The verdict on the shared rows.

    Args:
        runs: A, B and all others with an answer to every shared row.
        losses: of each run, by its id: mean per shared picture, float64 [pictures].
    """
    same = same_setting(a, b)
    of_a, of_b = ([a], [b]) if same else (repeats_of(a, runs), repeats_of(b, runs))
    mean_a, mean_b = (np.mean([losses[id(run)] for run in group], axis=0) for group in (of_a, of_b))
    change = bootstrap.estimate(mean_b - mean_a, seed=0)
    groups = {setting(run): repeats_of(run, runs) for run in runs}
    sd, df = pooled_sd([[losses[id(run)].mean() for run in group] for group in groups.values()])
    if df:
        change = widened(change, over_seeds(sd, df, len(of_a), len(of_b)))
    equal = np.array_equal(losses[id(a)], losses[id(b)])
    return Verdict(
        word="equal" if equal else "within noise" if same else in_words(change),
        loss=float(mean_a.mean()),
        change=change,
        num_pictures=len(mean_a),
        runs=(tuple(run.name for run in of_a), tuple(run.name for run in of_b)),
        seed_sd=sd,
        df=df,
        same_setting=same,
    )


def in_words(change: Estimate) -> Word:
    """Of a loss, which is better where it is lower."""
    return "better" if change.high < 0 else "worse" if change.low > 0 else "within noise"


def why_not(a: Side, b: Side, num_shared: int) -> str:
    """What keeps the two tables from sharing pictures, as far as lineage.json and pictures.csv tell."""
    if num_shared:
        return f"the held-out tables share {num_shared} picture, and an interval takes {MIN_PICTURES}"
    reasons = [f"the {name}" for name in DECIDE_TARGETS if a.lineage["base"].get(name) != b.lineage["base"].get(name)]
    asked_a, asked_b = a.lineage["validate"], b.lineage["validate"]
    reasons += [f"validate.{key}" for key in DECIDE_ROWS if asked_a.get(key) != asked_b.get(key)]
    if not reasons:
        reasons = [pictures_or_captions(a, b)]
    unnamed = [side.name for side in (a, b) if not side.scores[0].row]
    if unnamed:
        reasons.append(f"{' and '.join(unnamed)} from before its rows had names")
    return f"the held-out table differs ({', '.join(reasons)})"


def pictures_or_captions(a: Side, b: Side) -> str:
    """Which of the two, where nothing else explains that no row is shared."""
    if a.pictures is None or b.pictures is None:
        return "pictures, their sizes or captions"
    of_a, of_b = (
        {row["sha256"]: row["captions"] for row in side.pictures or () if row["split"] == "heldout"} for side in (a, b)
    )
    shared = of_a.keys() & of_b.keys()
    if not shared:
        return "pictures"
    return "captions" if any(of_a[sha256] != of_b[sha256] for sha256 in shared) else "sizes or crops of the pictures"
