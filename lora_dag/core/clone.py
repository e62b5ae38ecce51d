"""Which clone of the repository a folder belongs to: ``lora-dag`` works from every folder below the root."""

from __future__ import annotations

from pathlib import Path

MARKS = ("dvc.yaml", "lora_dag/__main__.py", "stages")
"""What the root holds; so does a copy that DVC makes for an experiment."""


def find(folder: Path) -> Path | None:
    """The nearest root at or above an absolute folder; None outside of every clone."""
    above = (folder, *folder.parents)
    return next((path for path in above if all((path / mark).exists() for mark in MARKS)), None)
