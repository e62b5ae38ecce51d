"""data/prepared/: what prepare hands to cache_latents. One JSON row per picture, sorted by file name.

manifest.jsonl  the rows        dataset.json  how they were made: preprocessing spec, source folder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.core.console import UserError
from stages.core.files import read_json, understood, write_json, write_text

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class View:
    """One way to look at a picture: a crop box in source pixels (after EXIF rotation), then perhaps a mirror."""

    crop: tuple[int, int, int, int]
    """left, top, right, bottom"""
    flip: bool


@dataclass(frozen=True)
class Item:
    """One picture of the dataset."""

    file_name: str
    """Relative to dataset.source, with forward slashes."""
    sha256: str
    """Of the file's bytes."""
    caption: str
    split: Split
    width: int
    """Of the picture that the model sees, in pixels."""
    height: int
    views: tuple[View, ...]


@dataclass(frozen=True)
class Manifest:
    items: list[Item]
    preprocessing: dict[str, Any]
    """What, beside the bytes, decides the pixels: filter, background colour, version. Part of every cache key."""
    source: str
    """dataset.source: the folder of the pictures, for the stage that reads them again. Part of no cache key."""

    def save(self, folder: Path) -> None:
        rows = sorted(self.items, key=lambda item: item.file_name)
        lines = [json.dumps(asdict(item), sort_keys=True, ensure_ascii=False) for item in rows]
        write_json(folder / "dataset.json", {"preprocessing": self.preprocessing, "source": self.source})
        write_text(folder / "manifest.jsonl", "\n".join(lines) + "\n")  # last: it says that the folder is whole

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        path = folder / "manifest.jsonl"
        for needed in (path, folder / "dataset.json"):
            if not needed.exists():
                raise UserError(f"{needed}: no such file; run `python -m stages.prepare` first")
        items = []
        with understood(path, "stages.prepare"):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                views = tuple(View(tuple(view["crop"]), view["flip"]) for view in row.pop("views"))
                items.append(Item(**row, views=views))
            if not items:
                raise ValueError("no rows")
            dataset = read_json(folder / "dataset.json")
            return cls(items, dataset["preprocessing"], dataset["source"])
