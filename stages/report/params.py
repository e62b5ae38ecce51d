"""Section ``report``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, field_validator

from lora_dag.core.params import Params
from lora_dag.core.setting_problem import setting_problem
from lora_dag.evaluation.metrics import DETAILS, NAMES, find


class Gates(Params):
    """Section ``report.gates``: limits that ``lora-dag gate`` checks."""

    max_heldout_change: float | None = Field(ge=0)
    """Largest rise of held-out loss against the other revision, as a share of its loss. 0: no rise beyond noise.
    null: no limit. If the held-out sets differ, the images in both are compared."""
    when_not_comparable: Literal["fail", "neutral"]
    """Verdict if the two revisions share no held-out image: ``fail``, or ``neutral`` (undecided)."""
    limits: dict[str, float]
    """Metric of docs/metrics.md -> worst allowed value, such as ``samples.copied_share: 0.1``. null: no limits. For
    a metric with an interval the better bound is compared, so that noise alone never fails."""

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
                text = f"got '{name}', but there is no such metric (near: {near}). docs/metrics.md lists all metrics."
                raise setting_problem("unknown-metric", text)
            if metric.better is None:
                text = f"got '{name}', but neither high nor low values of this metric are better. Limit another metric."
                raise setting_problem("limit-without-direction", text)
            if metric.unit == "share" and not 0 <= limit <= 1:
                text = f"got {limit:g} for '{name}', but a share is expected. Set a limit between 0 and 1."
                raise setting_problem("share-out-of-range", text)
        return limits


class ReportParams(Params):
    """Section ``report``."""

    title: str | None = Field(min_length=1)
    """Title of report and model card. null: title of the dataset in ``export.datasets``, or name of its folder."""
    gates: Gates
    """Limits that decide whether a pull request passes. They do not change the report."""
