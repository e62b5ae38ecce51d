"""Section ``train`` of the repository's params.yaml, with changes."""

from __future__ import annotations

from lora_dag.core import params
from stages.train.params import TrainParams
from tests.helpers.workspace import REPOSITORY


def train_params(*changes: str) -> TrainParams:
    """Each change such as ``batch_size=2``."""
    return params.load(REPOSITORY / "params.yaml", [f"train.{change}" for change in changes]).section(TrainParams)
