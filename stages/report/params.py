"""Section ``report``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lora_dag.core.params import Params


class Gates(Params):
    """Section ``report.gates``: what ``lora-dag gate`` lets pass. null asks nothing.

    Of a figure with an interval the lower bound is asked, so that noise alone closes no gate.
    """

    max_heldout_change: float | None = Field(ge=0)
    """Held-out loss against that of the revision compared with, as a share of it; 0: not worse beyond noise.

    Where the held-out pictures differ, it is of those that both hold out.
    """
    when_not_comparable: Literal["fail", "neutral"]
    """Where the two hold out nothing in common: fail closes ``max_heldout_change``, neutral leaves it undecided."""
    max_overfit_gap: float | None
    """``val.overfit_gap``, MSE."""
    max_drift_change: float | None
    """``drift.loss_change``, MSE."""
    max_copied_share: float | None = Field(ge=0, le=1)
    """``samples.copied_share``."""
    max_export_error: float | None = Field(ge=0)
    """``export.*.max_abs_error`` of every format; copies of a smaller rank differ by design and are not asked."""


class ReportParams(Params):
    """Section ``report``."""

    title: str | None = Field(min_length=1)
    """First heading of the pages; null for that of the dataset (``export.datasets``), or its folder's name."""
    gates: Gates
    """No part of the report: they decide whether a pull request passes."""
