"""Section ``report``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, field_validator

from lora_dag.core.params import Params
from lora_dag.evaluation.metrics import DETAILS, NAMES, find


class Gates(Params):
    """Section ``report.gates``: what ``lora-dag gate`` lets pass."""

    max_heldout_change: float | None = Field(ge=0)
    """Held-out loss against that of the revision compared with, as a share of it; 0: not worse beyond noise; null: any.

    Where the held-out pictures differ, it is of those that both hold out.
    """
    when_not_comparable: Literal["fail", "neutral"]
    """Where the two hold out nothing in common: fail closes ``max_heldout_change``, neutral leaves it undecided."""
    limits: dict[str, float]
    """Metric of docs/metrics.md -> the worst value that passes, such as ``samples.copied_share: 0.1``; null for none.

    Of a metric with an interval the better bound is compared, so that noise alone closes no gate.
    """

    @field_validator("limits", mode="before")
    @classmethod
    def null_is_none(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("limits")
    @classmethod
    def limits_are_of_metrics(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            metric = None if name.endswith(DETAILS) else find(name)
            if metric is None:
                near = ", ".join(get_close_matches(name, NAMES, n=1)) or "val.overfit_gap"
                raise ValueError(f"'{name}' is no metric (near: {near}); docs/metrics.md lists all")
            if metric.better is None:
                raise ValueError(f"'{name}' is neither better high nor low; limit a metric with a better direction")
            if metric.unit == "share" and not 0 <= limit <= 1:
                raise ValueError(f"'{name}' is a share, and {limit:g} is not; set 0 to 1")
        return limits


class ReportParams(Params):
    """Section ``report``."""

    title: str | None = Field(min_length=1)
    """First heading of the pages; null for that of the dataset (``export.datasets``), or its folder's name."""
    gates: Gates
    """No part of the report: they decide whether a pull request passes."""
