"""Describe overfitting, and samples or losses that are worse than their control, for report, card and compare.

The control of a metric is its value for the base model, or by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_dag.core.console import plural
from lora_dag.pages.markdown import decimals, interval

BOOTSTRAP = "percentile bootstrap, stretched to Student's width"
"""Method of the intervals over images: lora_dag/evaluation/bootstrap.py."""
FEW_IMAGES = 10
"""With fewer held-out images, "no difference" and "no sign of overfitting" mean nothing."""
TAIL = 0.05  # share of held-out images at either end of their distances; also the level of significance
MOST = 0.5
COLLAPSED = 0.5
"""Share of the base's diversity. An adapter that learned one style always has less diversity than the base."""

Metrics = Mapping[str, Any]
"""Name -> value of reports/metrics.json."""


def concerns(measured: Metrics, lineage: Mapping[str, Any]) -> list[str]:
    """Return a clause per metric that is worse than its control; metrics that were not measured are skipped.

    Args:
        lineage: content of reports/validate/lineage.json.
    """
    samples = [*copies(measured, lineage), *unlike_dataset(measured, lineage), *blank(measured, lineage)]
    return samples + [*collapse(measured), *drift(measured)]


def overfitting(measured: Metrics, num_steps: int) -> str:
    """Return a clause if held-out loss rose, or if training images gained more than held-out images; else "".

    A gap alone is weak evidence: images with a higher loss under the base have more to gain.
    """
    if (onset := number(measured, "val.onset_step")) == onset:
        return f"it overfits from step {onset:.0f} on (lowest held-out loss at step {measured['val.best_step']})"
    gap, low, high = (number(measured, f"val.overfit_gap{bound}") for bound in ("", "_low", "_high"))
    if not low > 0:
        return ""
    spec, best = decimals(low, high, least=4), measured["val.best_step"]
    gained = f"training images gained {gap:{spec}} {interval(low, high, spec)} more than held-out images"
    if best == num_steps:
        return f"{gained}, but held-out loss is lowest at the end"
    return f"it overfits: {gained}, and held-out loss was lowest at step {best} of {num_steps}"


def number(values: Metrics, name: str) -> float:
    """Return a metric as a number; NaN if it is null or absent."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


# Samples


def copies(measured: Metrics, lineage: Mapping[str, Any]) -> Iterator[str]:
    """Yield a clause if more samples are near a training image than by chance and for the base."""
    share = Share.from_metrics("copied_share", measured, lineage)
    if share.value > max(share.base, share.chance):
        yield f"{share.counted} as copies of training images ({share.control})"


def unlike_dataset(measured: Metrics, lineage: Mapping[str, Any]) -> Iterator[str]:
    """Yield a clause if more samples are far from all training images than by chance and for the base."""
    share = Share.from_metrics("far_share", measured, lineage)
    if share.value > max(share.base, share.chance) and (share.is_beyond_chance or share.value >= MOST):
        yield f"{share.counted} as unlike any image of the dataset ({share.control})"


def blank(measured: Metrics, lineage: Mapping[str, Any]) -> Iterator[str]:
    """Yield a clause if more samples are of one color than for the base."""
    share = Share.from_metrics("blank_share", measured, lineage)
    if share.value > share.base:
        yield f"{share.counted} as blank (base: {share.amount(share.base)})"


@dataclass(frozen=True)
class Share:
    """Share of the samples with some property, and its control."""

    value: float
    base: float
    chance: float
    """Share of held-out images beyond the limit, which ``Neighbors.threshold`` computes from them."""
    size: int
    """Number of samples; 0 if a revision does not have it."""
    num_heldout: int

    @classmethod
    def from_metrics(cls, name: str, measured: Metrics, lineage: Mapping[str, Any]) -> Share:
        settings, count = lineage["validate"], lineage.get("neighbors", {}).get("num_heldout", 0)
        value, base = (number(measured, f"samples.{name}{suffix}") for suffix in ("", "_base"))
        return cls(
            value,
            base,
            max(TAIL, 1 / (count + 1)),
            len(settings.get("prompts", [])) * settings.get("num_seeds", 0),
            count,
        )

    @property
    def counted(self) -> str:
        """Return ``3 of 24 samples count``."""
        if not self.size:
            return f"{self.amount(self.value)} of the samples count"
        return f"{self.amount(self.value)} of {plural(self.size, 'sample counts', 'samples count')}"

    @property
    def control(self) -> str:
        """Return ``1.2 by chance, base: 0``, and a note if so few samples do not exclude chance."""
        caveat = "" if self.is_beyond_chance else f"; {plural(self.size, 'sample')} do not exclude chance"
        return f"{self.amount(self.chance)} by chance, base: {self.amount(self.base)}{caveat}"

    def amount(self, share: float) -> str:
        return f"{share * self.size:.3g}" if self.size else f"{100 * share:.2g} %"

    @property
    def is_beyond_chance(self) -> bool:
        """Return whether held-out images would give so many less than once in twenty times.

        The limit is an order statistic of n held-out images, the (n + 1) p-th. So the share beyond it follows a Beta
        distribution, and the number of samples a beta-binomial distribution: few held-out images widen it.
        """
        a, b = self.chance * (self.num_heldout + 1), (1 - self.chance) * (self.num_heldout + 1)
        ways = -log_beta(a, b) - math.log(self.size + 1)
        tail = range(round(self.value * self.size), self.size + 1)
        terms = (log_beta(a + k, b + self.size - k) - log_beta(1 + k, 1 + self.size - k) for k in tail)
        return not self.size or sum(math.exp(ways + term) for term in terms) < TAIL


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def too_few_images(num_heldout: int, lineage: Mapping[str, Any], is_named: bool = False) -> str:
    """Return ``3 held-out images are too few for a verdict. Set dataset.heldout_fraction=0.35.``

    The suggested setting holds out FEW_IMAGES or more.

    Args:
        num_heldout: number of held-out images in the table.
        is_named: whether ``dataset.heldout_split`` names the held-out images.
    """
    counts, of_table = lineage.get("dataset", {}), lineage.get("table", {}).get("num_images", {})
    heldout, every = counts.get("heldout", 0), counts.get("heldout", 0) + counts.get("train", 0)
    if heldout > of_table.get("heldout", heldout):
        suggestion = f"Set validate.max_images={heldout}"
    elif is_named or not heldout:
        suggestion = "Hold out more images"
    else:
        steps = max(math.ceil(20 * FEW_IMAGES / every), math.floor(20 * heldout / every) + 1)
        suggestion = f"Set dataset.heldout_fraction={min(steps, 10) / 20:g}"
        suggestion += " or add images" if steps > 10 else ""
    count = plural(num_heldout, "held-out image is", "held-out images are")
    return f"{count} too few for a verdict. {suggestion}."


def collapse(measured: Metrics) -> Iterator[str]:
    """Yield a clause if images of one prompt are far more alike than images of the base."""
    spread, base = (number(measured, f"samples.diversity{suffix}") for suffix in ("", "_base"))
    if spread < COLLAPSED * base:
        yield f"images of one prompt differ only {times(spread / base)} as much as with the base"


# Drift


def drift(measured: Metrics) -> Iterator[str]:
    """Yield a clause if the loss on the base's own images rose beyond its interval, or doubled without one."""
    loss, base, low = (number(measured, f"drift.{name}") for name in ("loss", "loss_base", "loss_change_low"))
    if not (low > 0 or (low != low and loss > 2 * base)):
        return
    spec = decimals(loss, base, least=4)
    grown = f"{times(loss / base)} as high as" if base else "higher than"
    yield f"loss on the base's own images is {grown} with the base ({base:{spec}} → {loss:{spec}})"


def times(factor: float) -> str:
    """Return ``11 times`` or ``1.03 times``."""
    return f"{factor:.0f} times" if factor >= 10 else f"{factor:.3g} times"
