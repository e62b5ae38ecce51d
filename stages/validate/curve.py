"""Losses by training step: which snapshot is best, how far the others are above it, and where overfitting sets in.

Per-picture losses in, reports/validate/curve.csv out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_dag.artifacts.metrics import Value
from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.bootstrap import Estimate

FIELDS = ("step", "heldout", "train_probe", "above_best", "above_best_low", "above_best_high")


@dataclass(frozen=True)
class Point:
    """One row of curve.csv; step 0 is the base."""

    step: int
    heldout: float
    train_probe: float
    above_best: Estimate
    """Held-out loss minus that of the best snapshot, over the same rows, with the interval over pictures."""


def make_curve(heldout: Mapping[int, np.ndarray], probe: Mapping[int, np.ndarray], seed: int) -> list[Point]:
    """In order of steps.

    Args:
        heldout: step -> loss of each held-out picture, float64 [pictures], the same order at every step.
        probe: the same of the train probe.
    """
    best = min(heldout, key=lambda step: (bootstrap.mean(heldout[step]), step))
    return [
        Point(
            step,
            bootstrap.mean(heldout[step]),
            bootstrap.mean(probe[step]),
            bootstrap.estimate(heldout[step] - heldout[best], seed),
        )
        for step in sorted(heldout)
    ]


def best_point(curve: Sequence[Point]) -> Point:
    """Of the lowest held-out loss, the first of several."""
    return min(curve, key=lambda point: (point.heldout, point.step))


def onset_step(curve: Sequence[Point]) -> int | None:
    """First snapshot after the best from which on the held-out loss is above its minimum while the probe's is below.

    Above: the paired interval of the difference lies above 0, at this snapshot and at every later one, of which there
    is at least one: the lowest of several snapshots is low by luck too, and a single one above it is no onset.
    Below: the train probe is lower than at the best snapshot. A held-out loss that rises together with the probe's is
    a training that diverges, not one that overfits. None where there is none, and with one held-out picture, which has
    no interval.
    """
    best, onset = best_point(curve), None
    for point in reversed(curve):
        overfits = point.above_best.low > 0 and point.train_probe < best.train_probe
        if point.step <= best.step or not overfits:
            break
        onset = point.step
    return None if onset == curve[-1].step else onset


def metrics(curve: Sequence[Point]) -> dict[str, Value]:
    return {
        "val.best_step": best_point(curve).step,
        "val.onset_step": onset_step(curve),
        **curve[-1].above_best.named("val.final_minus_best"),
    }


def write(curve: Sequence[Point]) -> str:
    """CSV text, six significant digits; bounds are ``nan`` with one held-out picture."""
    lines = []
    for point in curve:
        above = point.above_best
        values = (point.heldout, point.train_probe, above.mean, above.low, above.high)
        lines.append((point.step, *(f"{value:.6g}" for value in values)))
    return heldout_table.write_csv(FIELDS, lines)


def read(text: str) -> list[Point]:
    """What ``write`` wrote, with its six digits.

    Raises:
        KeyError, ValueError: no such table, or one without rows.
    """
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
    if not rows:
        raise ValueError("no rows")
    estimates = [Estimate(row["above_best"], row["above_best_low"], row["above_best_high"]) for row in rows]
    return [
        Point(int(row["step"]), row["heldout"], row["train_probe"], above)
        for row, above in zip(rows, estimates, strict=True)
    ]
