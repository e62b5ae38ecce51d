"""reports/**/metrics.json: flat, stable names, six significant digits, no values that differ between equal runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import read_json, write_json
from lora_dag.core.labels import type_name

Value = float | int | str | bool | None


def save(path: Path, metrics: Mapping[str, Value]) -> None:
    write_json(path, {name: rounded(value) for name, value in metrics.items()})


def load(path: Path) -> dict[str, Value]:
    """Return names and values.

    Raises:
        UserError: the file is damaged.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        text = f"{path}: got {type_name(values)}, but a JSON object is expected. Run `dvc repro`."
        raise UserError(Problem("artifact-damaged", text))
    return values


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(value: Value) -> Value:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
