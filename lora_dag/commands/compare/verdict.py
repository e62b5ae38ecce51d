"""Decide whether revision B is better than revision A, by their paired losses on the same held-out rows.

Two things are random: the choice of held-out images and the training seed. The interval always covers the first. It
covers the second if a setting was run with several seeds; otherwise the verdict notes that it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lora_dag.commands.compare.interval import over_seeds, pooled_sd, widened
from lora_dag.commands.compare.repeats import repeats_of
from lora_dag.commands.compare.revision_report import RevisionReport
from lora_dag.commands.compare.run_inputs import same_setting, setting
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.evaluation.heldout_table import Score
from lora_dag.pages.markdown import decimals, interval, signed

MIN_IMAGES = 2  # one image has no interval
Word = Literal["better", "worse", "within noise", "equal", "not comparable"]
DECIDE_TARGETS = ("vae", "scheduler")  # of the base
DECIDE_ROWS = ("seed", "num_timesteps")  # of section validate


@dataclass(frozen=True)
class Verdict:
    """Result of the comparison of B with A on held-out images."""

    word: Word
    why: str = ""
    """Reason of "not comparable"."""
    loss: float = math.nan
    """Mean held-out loss of A's runs on the shared rows."""
    change: Estimate = Estimate(math.nan, math.nan, math.nan)
    """B's loss minus A's, with its 95 % interval."""
    num_images: int = 0
    """Number of shared held-out images."""
    num_each: tuple[int, int] = (0, 0)
    """Numbers of held-out images of A and of B."""
    runs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Names of the runs whose losses were averaged: A and its repeats, B and its repeats."""
    seed_sd: float = math.nan
    """Standard deviation of the loss between seeds; NaN if no setting was repeated."""
    df: int = 0
    """Degrees of freedom of ``seed_sd``."""
    same_setting: bool = False
    """Whether A and B differ at most in train.seed."""

    def __str__(self) -> str:
        """Return ``better, −3.1 % [−4.0, −2.2]``, in percent of A's loss; no bounds for one setting and seed."""
        if self.word == "not comparable":
            return f"not comparable: {self.why}"
        if self.word == "equal":
            return "equal: all held-out losses are identical"
        change = percent(self.change, self.loss, has_bounds=bool(self.df) or not self.same_setting)
        once = ", with one seed each" if self.word in ("better", "worse") and not self.df else ""
        return f"{self.word}, {change}{once}"


def percent(change: Estimate, of: float, has_bounds: bool = True) -> str:
    """Return ``−3.1 % [−4.0, −2.2]``; without bounds if they are NaN, as for one image."""
    mean, low, high = (100 * value / of for value in (change.mean, change.low, change.high))
    spec = decimals(mean, low, high, least=1)
    return f"{signed(mean, spec)} %" + (f" {interval(low, high, spec)}" if has_bounds and low == low else "")


def judge(a: RevisionReport, b: RevisionReport, others: Sequence[RevisionReport] = ()) -> Verdict:
    """Compare B with A, each averaged with its repeats.

    Args:
        others: more runs. Runs that differ from A or B only in train.seed are averaged with it. All runs that differ
            only in train.seed estimate the effect of a seed.
    """
    by_position = not (a.scores[0].row and b.scores[0].row)
    rows_of = {id(revision): heldout(revision, by_position) for revision in (a, b, *others)}
    shared = [row for row in rows_of[id(a)] if row in rows_of[id(b)]]
    images = [rows_of[id(a)][row].file_name for row in shared]
    if len(set(images)) < MIN_IMAGES:
        return Verdict("not comparable", why_not(a, b, len(set(images))), num_images=len(set(images)))
    losses = {}
    for revision in (a, b, *others):
        if rows_of[id(revision)].keys() >= set(shared):
            values = (rows_of[id(revision)][row].adapter for row in shared)
            losses[id(revision)] = bootstrap.by_image(zip(images, values, strict=True))
    for revision in (a, b):
        if not np.isfinite(losses[id(revision)]).all():
            why = f"a held-out loss of {revision.name} is not a number"
            return Verdict("not comparable", why, num_images=len(set(images)))
    num_a, num_b = (len({score.file_name for score in rows_of[id(revision)].values()}) for revision in (a, b))
    runs = [revision for revision in (a, b, *others) if np.isfinite(losses.get(id(revision), np.nan)).all()]
    return replace(judge_shared_rows(a, b, runs, losses), num_each=(num_a, num_b))


def heldout(revision: RevisionReport, by_position: bool) -> dict[str, Score]:
    """Return name -> held-out row; the name is table digest and position if the rows have no names."""
    named = (
        (f"{revision.metrics.get('val.table')} {i}" if by_position else s.row, s) for i, s in enumerate(revision.scores)
    )
    return {name: score for name, score in named if score.split == "heldout"}


def judge_shared_rows(
    a: RevisionReport, b: RevisionReport, runs: Sequence[RevisionReport], losses: Mapping[int, np.ndarray]
) -> Verdict:
    """Return the verdict on the shared rows.

    Args:
        runs: A, B and all others that have every shared row.
        losses: id of a run -> mean loss per shared image, float64 [images].
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
        word="equal" if equal else "within noise" if same else verdict_word(change),
        loss=float(mean_a.mean()),
        change=change,
        num_images=len(mean_a),
        runs=(tuple(run.name for run in of_a), tuple(run.name for run in of_b)),
        seed_sd=sd,
        df=df,
        same_setting=same,
    )


def verdict_word(change: Estimate) -> Word:
    """Return the word for a change of a loss: lower is better."""
    return "better" if change.high < 0 else "worse" if change.low > 0 else "within noise"


def why_not(a: RevisionReport, b: RevisionReport, num_shared: int) -> str:
    """Return why the two tables do not share enough images, from lineage.json and images.csv."""
    if num_shared:
        return f"the held-out tables share {num_shared} image, but an interval needs {MIN_IMAGES}"
    reasons = [f"the {name}" for name in DECIDE_TARGETS if a.lineage["base"].get(name) != b.lineage["base"].get(name)]
    settings_a, settings_b = a.lineage["validate"], b.lineage["validate"]
    reasons += [f"validate.{key}" for key in DECIDE_ROWS if settings_a.get(key) != settings_b.get(key)]
    if not reasons:
        reasons = [images_or_captions(a, b)]
    unnamed = [revision.name for revision in (a, b) if not revision.scores[0].row]
    if unnamed:
        reasons.append(f"rows of {' and '.join(unnamed)} have no names")
    return f"the held-out tables differ ({', '.join(reasons)})"


def images_or_captions(a: RevisionReport, b: RevisionReport) -> str:
    """Return what differs if nothing else explains that no row is shared."""
    if a.images is None or b.images is None:
        return "images, their sizes or captions"
    of_a, of_b = (
        {row["sha256"]: row["captions"] for row in revision.images or () if row["split"] == "heldout"}
        for revision in (a, b)
    )
    shared = of_a.keys() & of_b.keys()
    if not shared:
        return "images"
    return "captions" if any(of_a[sha256] != of_b[sha256] for sha256 in shared) else "sizes or crops of the images"
