"""What the other stages reported: the numbers, tables and pictures that the pages are made of."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_dag.artifacts import lineage, metrics, picture_table
from lora_dag.artifacts.metrics import Value
from lora_dag.core.console import UserError
from lora_dag.core.files import understood

T = TypeVar("T")
Metrics = Mapping[str, Value]


@dataclass(frozen=True)
class Inputs:
    """What the other stages reported."""

    measured: Metrics
    """reports/metrics.json"""
    lineage: dict[str, Any]
    """reports/validate/lineage.json"""
    curve: list[dict[str, float]]
    """step, heldout, train_probe"""
    train: Metrics
    loss: list[dict[str, float]]
    """step, loss, learning_rate, grad_norm"""
    dataset: Metrics
    rows: list[picture_table.Row]
    """reports/dataset/pictures.csv"""
    latents: Metrics
    export: Metrics
    made: dict[str, Any]
    """reports/export/lineage.json"""
    energy: list[dict[str, str]]
    """reports/export/energy.csv: layer, rank, energy; empty where the adapter is no LoRA, or of rank 1"""
    pictures: dict[str, Path]
    """samples, progress, contact, loss, table (pictures.csv); nearest and nearest_table where copies were looked for"""
    has_named_split: bool = False
    """``dataset.heldout_split`` is set, so that no fraction can be."""


def read_inputs(reports: Path, dataset: Path, latents: Path, train: Path, export: Path) -> Inputs:
    """Read every stage's report.

    Raises:
        UserError: files are missing or damaged; the stage that writes each is named.
    """
    writers = {
        reports / "metrics.json": "validate",
        reports / "validate" / "lineage.json": "validate",
        reports / "validate" / "curve.csv": "validate",
        reports / "samples.png": "validate",
        reports / "progress.png": "validate",
        train / "metrics.json": "train",
        train / "loss.csv": "train",
        dataset / "metrics.json": "prepare",
        dataset / "contact.png": "prepare",
        dataset / "pictures.csv": "prepare",
        latents / "metrics.json": "cache_latents",
        export / "metrics.json": "export",
        export / "lineage.json": "export",
        export / "energy.csv": "export",
    }
    missing = [
        f"{path}: no such file; run `python -m stages.{stage}` first"
        for path, stage in writers.items()
        if not path.exists()
    ]
    if missing:
        raise UserError(*missing)
    pictures = {name: reports / f"{name}.png" for name in ("samples", "progress", "loss")}
    found = {"nearest": reports / "validate" / "nearest.png", "nearest_table": reports / "validate" / "nearest.csv"}
    pictures |= {name: path for name, path in found.items() if path.exists()}
    table = dataset / "pictures.csv"

    def read(path: Path, parse: Callable[[Path], T]) -> T:
        with understood(path, f"stages.{writers[path]}"):
            return parse(path)

    return Inputs(
        measured=metrics.load(reports / "metrics.json"),
        lineage=read(reports / "validate" / "lineage.json", lineage.load),
        curve=read(reports / "validate" / "curve.csv", read_numbers),
        train=metrics.load(train / "metrics.json"),
        loss=read(train / "loss.csv", read_numbers),
        dataset=metrics.load(dataset / "metrics.json"),
        rows=read(table, picture_table.load),
        latents=metrics.load(latents / "metrics.json"),
        export=metrics.load(export / "metrics.json"),
        made=read(export / "lineage.json", lineage.load),
        energy=read(export / "energy.csv", read_rows),
        pictures=pictures | {"contact": dataset / "contact.png", "table": table},
    )


def read_numbers(path: Path) -> list[dict[str, float]]:
    """Raises what ``understood`` explains where a cell is missing or is no number."""
    return [{name: float(value) for name, value in row.items()} for row in read_rows(path)]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
