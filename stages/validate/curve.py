"""Losses by training step: the best snapshot, the distance of all others to it, and the onset of overfitting.

In: per-image losses.  Out: reports/validate/curve.csv.
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
class CurvePoint:
    """One row of curve.csv. Step 0 is the base."""

    step: int
    heldout: float
    train_probe: float
    above_best: Estimate
    """Held-out loss minus the loss of the best snapshot on the same rows, with its interval over images."""


def make_curve(heldout: Mapping[int, np.ndarray], probe: Mapping[int, np.ndarray], seed: int) -> list[CurvePoint]:
    """Return one point per step, in order.

    Args:
        heldout: step -> loss of each held-out image, float64 [images], in one order at every step.
        probe: step -> loss of each image of the train probe, float64 [images].
    """
    best = min(heldout, key=lambda step: (bootstrap.mean(heldout[step]), step))
    return [
        CurvePoint(
            step,
            bootstrap.mean(heldout[step]),
            bootstrap.mean(probe[step]),
            bootstrap.estimate(heldout[step] - heldout[best], seed),
        )
        for step in sorted(heldout)
    ]


def best_point(curve: Sequence[CurvePoint]) -> CurvePoint:
    """Return the point with the lowest held-out loss; the first of equal ones."""
    return min(curve, key=lambda point: (point.heldout, point.step))


def onset_step(curve: Sequence[CurvePoint]) -> int | None:
    """Return the first snapshot after the best one from which on training overfits; None without overfitting.

    A snapshot overfits if the paired interval of its held-out loss minus the lowest one is above 0 and the loss of the
    train probe is below its value at the best snapshot. If both losses rise, training diverges and does not overfit.
    All later snapshots must overfit, and at least one: the lowest of several losses is low by chance too, so that a
    single higher one proves nothing. With one held-out image there is no interval and no onset.
    """
    best, onset = best_point(curve), None
    for point in reversed(curve):
        overfits = point.above_best.low > 0 and point.train_probe < best.train_probe
        if point.step <= best.step or not overfits:
            break
        onset = point.step
    return None if onset == curve[-1].step else onset


def metrics(curve: Sequence[CurvePoint]) -> dict[str, Value]:
    """Return ``val.best_step``, ``val.onset_step`` and ``val.final_minus_best``."""
    return {
        "val.best_step": best_point(curve).step,
        "val.onset_step": onset_step(curve),
        **curve[-1].above_best.named("val.final_minus_best"),
    }


def to_csv(curve: Sequence[CurvePoint]) -> str:
    """Return CSV text with six significant digits. Bounds are ``nan`` with one held-out image."""
    lines = []
    for point in curve:
        above = point.above_best
        values = (point.heldout, point.train_probe, above.mean, above.low, above.high)
        lines.append((point.step, *(f"{value:.6g}" for value in values)))
    return heldout_table.csv_text(FIELDS, lines)


def from_csv(text: str) -> list[CurvePoint]:
    """Return the points of a text that ``to_csv`` returned.

    Raises:
        KeyError, ValueError: a column is missing, or there are no rows.
    """
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
    if not rows:
        raise ValueError("no rows")
    estimates = [Estimate(row["above_best"], row["above_best_low"], row["above_best_high"]) for row in rows]
    return [
        CurvePoint(int(row["step"]), row["heldout"], row["train_probe"], above)
        for row, above in zip(rows, estimates, strict=True)
    ]
