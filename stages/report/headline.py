"""Write reports/headline.json: the few metrics that `dvc exp show`, `dvc metrics diff` and editors show as columns.

All metrics of a stage are in its own metrics.json, which DVC lists as a plot, so that it adds no columns.
"""

from __future__ import annotations

from lora_dag.artifacts.metrics import Value
from lora_dag.evaluation.metrics import METRICS
from stages.report.inputs import Inputs


def numbers(inputs: Inputs) -> dict[str, Value]:
    """Return the measured metrics that METRICS marks as ``headline``."""
    every = {**inputs.dataset, **inputs.train, **inputs.measured, **inputs.export}
    names = [name + ending for name, metric in METRICS.items() for ending in metric.headline]
    return {name: every[name] for name in names if every.get(name) is not None}
