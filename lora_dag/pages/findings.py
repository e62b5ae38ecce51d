"""What a run's figures say beside its loss, in words: whatever crossed its control. For report, card and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_dag.core.console import plural
from lora_dag.pages.markdown import decimals, interval

BOOTSTRAP = "percentile bootstrap, stretched to Student's width"
"""How the intervals over pictures are made: lora_dag/evaluation/bootstrap.py."""
FEW_PICTURES = 10
"""Held out; below it "no difference" and "no sign" would say nothing."""
TAIL = 0.05  # of pictures, at either end of the held-out ones' distances; and of chance
MOST = 0.5
COLLAPSED = 0.5
"""Share of the base's diversity; an adapter that learned one style always has somewhat less than the base."""

Figures = Mapping[str, Any]
"""Metrics of reports/metrics.json, by name."""


def crossed(measured: Figures, lineage: Mapping[str, Any]) -> list[str]:
    """A clause for each figure beyond its control, the base's or chance's; what was not measured is passed over.

    Args:
        lineage: of reports/validate/lineage.json.
    """
    samples = [*copies(measured, lineage), *unlike(measured, lineage), *blank(measured, lineage)]
    return samples + [*collapse(measured), *drift(measured)]


def overfits(measured: Figures, num_steps: int) -> str:
    """A clause where the training pictures gained more than the held-out ones, or held-out loss rose; else empty.

    A gap alone is weak evidence: pictures that the base finds harder have more to gain.
    """
    if (onset := number(measured, "val.onset_step")) == onset:
        return f"it overfits from step {onset:.0f} on, and held-out loss was lowest at step {measured['val.best_step']}"
    gap, low, high = (number(measured, f"val.overfit_gap{bound}") for bound in ("", "_low", "_high"))
    if not low > 0:
        return ""
    spec, best = decimals(low, high, least=4), measured["val.best_step"]
    gained = f"training pictures gained {gap:{spec}} more {interval(low, high, spec)}"
    if best == num_steps:
        return f"{gained}, but held-out loss was still at its lowest in the end"
    return f"it overfits: {gained}, and held-out loss was lowest at step {best}, not at {num_steps}"


def number(values: Figures, name: str) -> float:
    """NaN where a metric is null or absent."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


# Samples


def copies(measured: Figures, lineage: Mapping[str, Any]) -> Iterator[str]:
    """More samples near a training picture than chance and the base have."""
    found = Share.of("copied_share", measured, lineage)
    if found.value > max(found.base, found.chance):
        yield f"{found.counted} as copies of training pictures ({found.control})"


def unlike(measured: Figures, lineage: Mapping[str, Any]) -> Iterator[str]:
    """More samples far from all training pictures, as noise is, than chance and the base have; or most of them."""
    found = Share.of("far_share", measured, lineage)
    if found.value > max(found.base, found.chance) and (found.is_beyond_chance or found.value >= MOST):
        yield f"{found.counted} as unlike any picture of the dataset ({found.control})"


def blank(measured: Figures, lineage: Mapping[str, Any]) -> Iterator[str]:
    found = Share.of("blank_share", measured, lineage)
    if found.value > found.base:
        yield f"{found.counted} as blank (the base's {found.amount(found.base)})"


@dataclass(frozen=True)
class Share:
    """A measure of the samples beside its control."""

    value: float
    base: float
    chance: float
    """Share of held-out pictures beyond a limit that they set themselves, as ``Neighbours.threshold`` explains."""
    size: int
    """Samples that were drawn; 0 where a revision does not say."""
    num_heldout: int

    @classmethod
    def of(cls, name: str, measured: Figures, lineage: Mapping[str, Any]) -> Share:
        asked, count = lineage["validate"], lineage.get("neighbours", {}).get("num_heldout", 0)
        value, base = (number(measured, f"samples.{name}{suffix}") for suffix in ("", "_base"))
        return cls(
            value, base, max(TAIL, 1 / (count + 1)), len(asked.get("prompts", [])) * asked.get("num_seeds", 0), count
        )

    @property
    def counted(self) -> str:
        """``3 of 24 samples count``"""
        if not self.size:
            return f"{self.amount(self.value)} of the samples count"
        return f"{self.amount(self.value)} of {plural(self.size, 'sample counts', 'samples count')}"

    @property
    def control(self) -> str:
        """``1.2 by chance, the base's 0``, and whether so many samples can tell."""
        caveat = "" if self.is_beyond_chance else f"; {plural(self.size, 'sample')} cannot rule chance out"
        return f"{self.amount(self.chance)} by chance, the base's {self.amount(self.base)}{caveat}"

    def amount(self, share: float) -> str:
        return f"{share * self.size:.3g}" if self.size else f"{100 * share:.2g} %"

    @property
    def is_beyond_chance(self) -> bool:
        """Whether so many would be beyond the limit less than once in twenty times, were they held-out pictures.

        The limit is an order statistic of n held-out pictures, the (n + 1) p-th. So the share beyond it is a draw of a
        Beta distribution, and the number of samples one of the beta-binomial: few held-out pictures widen it.
        """
        a, b = self.chance * (self.num_heldout + 1), (1 - self.chance) * (self.num_heldout + 1)
        ways = -log_beta(a, b) - math.log(self.size + 1)
        tail = range(round(self.value * self.size), self.size + 1)
        terms = (log_beta(a + k, b + self.size - k) - log_beta(1 + k, 1 + self.size - k) for k in tail)
        return not self.size or sum(math.exp(ways + term) for term in terms) < TAIL


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def cannot_tell(num_heldout: int, lineage: Mapping[str, Any], is_named: bool = False) -> str:
    """``3 held-out pictures cannot tell; set dataset.heldout_fraction=0.35``, which holds out FEW_PICTURES or more.

    Args:
        num_heldout: that were asked about.
        is_named: of a split of one's own.
    """
    counts, asked = lineage.get("dataset", {}), lineage.get("table", {}).get("num_pictures", {})
    heldout, every = counts.get("heldout", 0), counts.get("heldout", 0) + counts.get("train", 0)
    if heldout > asked.get("heldout", heldout):
        cure = f"set validate.max_pictures={heldout}"
    elif is_named or not heldout:
        cure = "hold out more pictures"
    else:
        steps = max(math.ceil(20 * FEW_PICTURES / every), math.floor(20 * heldout / every) + 1)
        cure = f"set dataset.heldout_fraction={min(steps, 10) / 20:g}" + (", or add pictures" if steps > 10 else "")
    return f"{plural(num_heldout, 'held-out picture')} cannot tell; {cure}"


def collapse(measured: Figures) -> Iterator[str]:
    """Pictures of one prompt that are far nearer to each other than the base's."""
    spread, base = (number(measured, f"samples.diversity{suffix}") for suffix in ("", "_base"))
    if spread < COLLAPSED * base:
        yield f"pictures of one prompt differ {times(spread / base)} as much as the base's"


# The base's own ground


def drift(measured: Figures) -> Iterator[str]:
    """A loss that rose beyond its interval; where one prompt has no interval, one that doubled."""
    loss, base, low = (number(measured, f"drift.{name}") for name in ("loss", "loss_base", "loss_change_low"))
    if not (low > 0 or (low != low and loss > 2 * base)):
        return
    spec = decimals(loss, base, least=4)
    grown = f"{times(loss / base)} as high as" if base else "above"
    yield f"loss on the base's own pictures is {grown} the base's ({base:{spec}} → {loss:{spec}})"


def times(factor: float) -> str:
    """``11 times``, ``1.03 times``"""
    return f"{factor:.0f} times" if factor >= 10 else f"{factor:.3g} times"
