"""Results -> tables of settings, best first. Losses are paired by image on the common rows of all runs.

The intervals are those of `compare` (compare/interval.py): held-out images are a sample, training seeds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_dag.commands.compare.interval import over_seeds, pooled_sd, widened
from lora_dag.commands.compare.verdict import MIN_IMAGES, Word, verdict_word
from lora_dag.commands.leaderboard.results import Result, setting_of
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import CONFIDENCE, Estimate
from lora_dag.evaluation.heldout_table import Score
from lora_dag.evaluation.t_distribution import t_quantile

EQUAL = Estimate(0.0, 0.0, 0.0)
"""Difference of settings with the same trainings that differ in validate or export."""


@dataclass(frozen=True)
class SettingResult:
    """A setting with one or more seeds, on the rows of its table."""

    name: str
    results: list[Result]
    losses: np.ndarray
    """Mean per held-out image, float64 [runs, images]."""
    base: np.ndarray
    """Losses of its base model, float64 [images]: settings of a table may have different base models."""
    change: Estimate
    """Loss minus the base's."""
    against_best: Estimate | None
    """Loss minus the best setting's; None for the best."""

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def verdict(self) -> Word | None:
        """Verdict against the best setting; None for the best."""
        if self.against_best is None:
            return None
        return "equal" if self.against_best == EQUAL else verdict_word(self.against_best)


@dataclass(frozen=True)
class Table:
    """Settings whose losses can be compared, best first."""

    ranking: list[SettingResult]
    num_images: int
    seed_sd: float
    """Pooled standard deviation of the loss between seeds of a setting; NaN without repeated settings."""
    df: int
    """Degrees of freedom of ``seed_sd``."""

    @property
    def datasets(self) -> list[str]:
        sources = (result.run.value("dataset.source") for each in self.ranking for result in each.results)
        return list(dict.fromkeys(sources))


def rank(results: Sequence[Result]) -> tuple[list[Table], list[Result]]:
    """Return a table for each set of runs with common held-out rows, and the other runs with reasons."""
    finished, left = [], []
    for result in results:
        if result.side is None:
            left.append(result)
        elif not heldout(result):
            left.append(Result(result.run, None, "validate: reports/validate/heldout.csv has no held-out row"))
        elif all(math.isfinite(score.adapter) for score in heldout(result).values()):
            finished.append(result)
        else:
            left.append(Result(result.run, None, "validate: a held-out loss is not a number"))
    return [table(group, rows) for group, rows in groups(finished)], left


def heldout(result: Result) -> dict[str, Score]:
    return {score.row: score for score in result.done.scores if score.split == "heldout"}


def groups(results: Iterable[Result]) -> list[tuple[list[Result], list[str]]]:
    """Return groups of runs with their common rows: each run joins the first group that it can be paired with.

    A pair needs at least half of the held-out images of the smaller set, so that no small overlap decides.
    """
    found: list[tuple[list[Result], list[str]]] = []
    for result in results:
        own = heldout(result)
        for index, (members, rows) in enumerate(found):
            shared = [row for row in rows if row in own]
            num_shared, num_own = (len({own[row].file_name for row in names}) for names in (shared, own))
            num_theirs = len({heldout(members[0])[row].file_name for row in rows})
            if num_shared >= max(MIN_IMAGES, min(num_own, num_theirs) / 2):
                found[index] = [*members, result], shared
                break
        else:
            found.append(([result], list(own)))
    return found


def table(results: Sequence[Result], rows: Sequence[str]) -> Table:
    scores = [heldout(result) for result in results]
    images = [scores[0][row].file_name for row in rows]
    losses = {
        result.run.name: bootstrap.by_image(zip(images, (own[row].adapter for row in rows), strict=True))
        for result, own in zip(results, scores, strict=True)
    }
    sd, df = seed_noise(results, losses)
    settings: dict[str, list[Result]] = {}
    for result in results:
        settings.setdefault(result.setting, []).append(result)
    stacked = {name: np.stack([losses[each.run.name] for each in group]) for name, group in settings.items()}
    own = {result.setting: answer for result, answer in zip(results, scores, strict=True)}
    bases = {name: bootstrap.by_image(zip(images, (own[name][row].base for row in rows), strict=True)) for name in own}
    order = sorted(settings, key=lambda name: (stacked[name].mean(), name))
    best = stacked[order[0]]
    ranking = [
        SettingResult(
            name=name,
            results=settings[name],
            losses=stacked[name],
            base=bases[name],
            change=against_base(stacked[name], bases[name], sd, df),
            against_best=difference(best, stacked[name], sd, df) if name != order[0] else None,
        )
        for name in order
    ]
    return Table(ranking, best.shape[1], sd, df)


def seed_noise(results: Sequence[Result], losses: dict[str, np.ndarray]) -> tuple[float, int]:
    """Return the pooled standard deviation between seeds and its degrees of freedom; each training counts once."""
    trainings = {result.run.stage_folders["train"]: losses[result.run.name].mean() for result in results}
    repeats: dict[str, list[float]] = {}
    for folder, loss in trainings.items():
        repeats.setdefault(setting_of(folder), []).append(float(loss))
    return pooled_sd(list(repeats.values()))


def difference(a: np.ndarray, b: np.ndarray, sd: float, df: int) -> Estimate:
    """Return the mean of ``b`` minus the mean of ``a``, both float64 [runs, images]."""
    if np.array_equal(a, b):
        return EQUAL
    change = bootstrap.estimate(b.mean(axis=0) - a.mean(axis=0), seed=0)
    return widened(change, over_seeds(sd, df, len(a), len(b))) if df else change


def against_base(losses: np.ndarray, base: np.ndarray, sd: float, df: int) -> Estimate:
    """Return the mean loss minus the base loss; the base has no seed."""
    change = bootstrap.estimate(losses.mean(axis=0) - base, seed=0)
    return widened(change, t_quantile(df, CONFIDENCE) * sd / math.sqrt(len(losses))) if df else change


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the indices of the Pareto front."""
    found = []
    last = math.inf, math.inf
    for cost, loss, index in sorted(zip(costs, losses, range(len(costs)), strict=True)):
        if loss < last[1] or (cost, loss) == last:
            found.append(index)
            last = cost, loss
    return found
