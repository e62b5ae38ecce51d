"""Read the reports of the other stages: metrics, tables and images for the pages."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_dag.artifacts import image_table, lineage, metrics
from lora_dag.artifacts.metrics import Value
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import artifact_errors

T = TypeVar("T")
Metrics = Mapping[str, Value]


@dataclass(frozen=True)
class Inputs:
    """Reports of the other stages."""

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
    rows: list[image_table.Row]
    """reports/dataset/images.csv"""
    latents: Metrics
    export: Metrics
    made: dict[str, Any]
    """reports/export/lineage.json"""
    energy: list[dict[str, str]]
    """reports/export/energy.csv: layer, rank, energy; empty for rank 1, or without LoRA"""
    images: dict[str, Path]
    """samples, progress, contact, loss, table (images.csv); nearest and nearest_table if copies were measured"""
    has_named_split: bool = False
    """Whether ``dataset.heldout_split`` is set, which excludes ``dataset.heldout_fraction``."""


def read_inputs(reports: Path, dataset: Path, latents: Path, train: Path, export: Path) -> Inputs:
    """Read every stage's report.

    Raises:
        UserError: files are missing or damaged; each problem names the stage that writes the file.
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
        dataset / "images.csv": "prepare",
        latents / "metrics.json": "cache_latents",
        export / "metrics.json": "export",
        export / "lineage.json": "export",
        export / "energy.csv": "export",
    }
    missing = [
        Problem("report-missing", f"{path}: the file is missing. Run `python -m stages.{stage}` first.")
        for path, stage in writers.items()
        if not path.exists()
    ]
    if missing:
        raise UserError(*missing)
    images = {name: reports / f"{name}.png" for name in ("samples", "progress", "loss")}
    copies = {"nearest": reports / "validate" / "nearest.png", "nearest_table": reports / "validate" / "nearest.csv"}
    images |= {name: path for name, path in copies.items() if path.exists()}
    table = dataset / "images.csv"

    def read(path: Path, parse: Callable[[Path], T]) -> T:
        with artifact_errors(path, f"stages.{writers[path]}"):
            return parse(path)

    return Inputs(
        measured=metrics.load(reports / "metrics.json"),
        lineage=read(reports / "validate" / "lineage.json", lineage.load),
        curve=read(reports / "validate" / "curve.csv", read_numbers),
        train=metrics.load(train / "metrics.json"),
        loss=read(train / "loss.csv", read_numbers),
        dataset=metrics.load(dataset / "metrics.json"),
        rows=read(table, image_table.load),
        latents=metrics.load(latents / "metrics.json"),
        export=metrics.load(export / "metrics.json"),
        made=read(export / "lineage.json", lineage.load),
        energy=read(export / "energy.csv", read_rows),
        images=images | {"contact": dataset / "contact.png", "table": table},
    )


def read_numbers(path: Path) -> list[dict[str, float]]:
    """Raises what ``artifact_errors`` explains where a cell is missing or is no number."""
    return [{name: float(value) for name, value in row.items()} for row in read_rows(path)]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
