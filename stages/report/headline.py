"""reports/headline.json: the few numbers that `dvc exp show`, `dvc metrics diff` and editors make columns of.

Every number that a stage measured is in its own metrics.json, which DVC lists as a plot, since it shows none of those.
"""

from __future__ import annotations

from lora_dag.artifacts.metrics import Value
from lora_dag.evaluation.metrics import METRICS
from stages.report.inputs import Inputs


def numbers(inputs: Inputs) -> dict[str, Value]:
    """Those of METRICS that say ``headline`` and were measured."""
    every = {**inputs.dataset, **inputs.train, **inputs.measured, **inputs.export}
    names = [name + ending for name, metric in METRICS.items() for ending in metric.headline]
    return {name: every[name] for name in names if every.get(name) is not None}
