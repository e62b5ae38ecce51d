"""reports/headline.json: the few numbers that `dvc exp show`, `dvc metrics diff` and editors make columns of.

Every number that a stage measured is in its own metrics.json, which DVC lists as a plot, since it shows none of those.
"""

from __future__ import annotations

from lora_dag.artifacts.metrics import Value
from stages.report.inputs import Inputs

NAMES = (
    "num_heldout",
    "train.num_trainable_parameters",
    "train.loss_final",
    "val.loss",
    "val.loss_change",
    "val.loss_change_low",
    "val.loss_change_high",
    "val.overfit_gap",
    "val.best_step",
    "drift.loss_change",
    "samples.copied_share",
    "samples.diversity",
    "samples.clip_score",
    "samples.cosine",
    "samples.cmmd",
    "export.megabytes",
)


def numbers(inputs: Inputs) -> dict[str, Value]:
    """Those of ``NAMES`` that were measured."""
    every = {**inputs.dataset, **inputs.train, **inputs.measured, **inputs.export}
    return {name: every[name] for name in NAMES if every.get(name) is not None}
