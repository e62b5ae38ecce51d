"""reports/**/metrics.json: flat, stable names, six significant digits, nothing that changes between equal runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, write_json

Value = float | int | str | bool | None


def save(path: Path, metrics: Mapping[str, Value]) -> None:
    write_json(path, {name: tidy(value) for name, value in metrics.items()})


def load(path: Path) -> dict[str, Value]:
    """Names and values.

    Raises:
        UserError: the file is damaged.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged, no names and values; run `dvc repro`")
    return values


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tidy(value: Value) -> Value:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
