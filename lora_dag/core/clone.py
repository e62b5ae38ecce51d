"""The clone of the repository that a folder belongs to: ``lora-dag`` can be started in any folder of a clone."""

from __future__ import annotations

from pathlib import Path

MARKS = ("dvc.yaml", "lora_dag/__main__.py", "stages")
"""Paths in the root of a clone, and in the copy that DVC makes for an experiment."""
PROJECT = "remote://project/"
"""Prefix of the base model in dvc.yaml and dvc.lock: DVC's remote for the folder of the clone (see dvc.yaml)."""


def find(folder: Path) -> Path | None:
    """Return the nearest root at or above an absolute folder; None outside of a clone."""
    above = (folder, *folder.parents)
    return next((path for path in above if all((path / mark).exists() for mark in MARKS)), None)
