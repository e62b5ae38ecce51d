"""Results -> tables of settings, best first: losses are paired, picture by picture, on the rows that all answered.

The intervals are those of `compare` (compare/interval.py): held-out pictures are a sample, training seeds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_dag.commands.compare.interval import over_seeds, pooled_sd, widened
from lora_dag.commands.compare.verdict import MIN_PICTURES, Word, in_words
from lora_dag.commands.leaderboard.results import Result, setting_of
from lora_dag.evaluation import bootstrap
from lora_dag.evaluation.bootstrap import CONFIDENCE, Estimate
from lora_dag.evaluation.heldout_table import Score
from lora_dag.evaluation.t_distribution import t_quantile

EQUAL = Estimate(0.0, 0.0, 0.0)
"""Of the same trainings, drawn or exported in another way."""


@dataclass(frozen=True)
class Standing:
    """A setting under one or more seeds, on the rows of its table."""

    name: str
    results: list[Result]
    losses: np.ndarray
    """Mean per held-out picture, float64 [runs, pictures]."""
    base: np.ndarray
    """Of its own base, float64 [pictures]: settings of one table may have other denoisers."""
    change: Estimate
    """Loss minus the base's."""
    against_best: Estimate | None
    """Loss minus the best setting's; None for the best."""

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def verdict(self) -> Word | None:
        """Of a setting against the best; None for the best."""
        if self.against_best is None:
            return None
        return "equal" if self.against_best == EQUAL else in_words(self.against_best)


@dataclass(frozen=True)
class Table:
    """Settings whose losses can be compared, best first."""

    standings: list[Standing]
    num_pictures: int
    seed_sd: float
    """Standard deviation of the loss between seeds of a setting, pooled; NaN where none was repeated."""
    df: int
    """Degrees of freedom of it."""

    @property
    def datasets(self) -> list[str]:
        sources = (result.run.value("dataset.source") for each in self.standings for result in each.results)
        return list(dict.fromkeys(sources))


def rank(results: Sequence[Result]) -> tuple[list[Table], list[Result]]:
    """A table for each set of runs with held-out rows in common; and the runs that stand in none, with reasons."""
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
    """Runs and the rows that all of them answered: each run joins the first ones that it can be paired with.

    That takes half of the held-out pictures of the one that has fewer: a chance overlap of two splits would have all
    judged by it.
    """
    found: list[tuple[list[Result], list[str]]] = []
    for result in results:
        own = heldout(result)
        for index, (members, rows) in enumerate(found):
            shared = [row for row in rows if row in own]
            num_shared, num_own = (len({own[row].file_name for row in names}) for names in (shared, own))
            num_theirs = len({heldout(members[0])[row].file_name for row in rows})
            if num_shared >= max(MIN_PICTURES, min(num_own, num_theirs) / 2):
                found[index] = [*members, result], shared
                break
        else:
            found.append(([result], list(own)))
    return found


def table(results: Sequence[Result], rows: Sequence[str]) -> Table:
    answers = [heldout(result) for result in results]
    pictures = [answers[0][row].file_name for row in rows]
    losses = {
        result.run.name: bootstrap.by_picture(zip(pictures, (own[row].adapter for row in rows), strict=True))
        for result, own in zip(results, answers, strict=True)
    }
    sd, df = seed_noise(results, losses)
    settings: dict[str, list[Result]] = {}
    for result in results:
        settings.setdefault(result.setting, []).append(result)
    stacked = {name: np.stack([losses[each.run.name] for each in group]) for name, group in settings.items()}
    own = {result.setting: answer for result, answer in zip(results, answers, strict=True)}
    bases = {
        name: bootstrap.by_picture(zip(pictures, (own[name][row].base for row in rows), strict=True)) for name in own
    }
    order = sorted(settings, key=lambda name: (stacked[name].mean(), name))
    best = stacked[order[0]]
    standings = [
        Standing(
            name=name,
            results=settings[name],
            losses=stacked[name],
            base=bases[name],
            change=against_base(stacked[name], bases[name], sd, df),
            against_best=difference(best, stacked[name], sd, df) if name != order[0] else None,
        )
        for name in order
    ]
    return Table(standings, best.shape[1], sd, df)


def seed_noise(results: Sequence[Result], losses: dict[str, np.ndarray]) -> tuple[float, int]:
    """Each training once: runs that differ in validate or export alone are no repeats of each other."""
    trainings = {result.run.places["train"]: losses[result.run.name].mean() for result in results}
    repeats: dict[str, list[float]] = {}
    for place, loss in trainings.items():
        repeats.setdefault(setting_of(place), []).append(float(loss))
    return pooled_sd(list(repeats.values()))


def difference(a: np.ndarray, b: np.ndarray, sd: float, df: int) -> Estimate:
    """Mean of ``b`` minus mean of ``a``, both float64 [runs, pictures]."""
    if np.array_equal(a, b):
        return EQUAL
    change = bootstrap.estimate(b.mean(axis=0) - a.mean(axis=0), seed=0)
    return widened(change, over_seeds(sd, df, len(a), len(b))) if df else change


def against_base(losses: np.ndarray, base: np.ndarray, sd: float, df: int) -> Estimate:
    """The base has no seed."""
    change = bootstrap.estimate(losses.mean(axis=0) - base, seed=0)
    return widened(change, t_quantile(df, CONFIDENCE) * sd / math.sqrt(len(losses))) if df else change


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in one and equals or beats in the other."""
    found = []
    last = math.inf, math.inf
    for cost, loss, index in sorted(zip(costs, losses, range(len(costs)), strict=True)):
        if loss < last[1] or (cost, loss) == last:
            found.append(index)
            last = cost, loss
    return found
