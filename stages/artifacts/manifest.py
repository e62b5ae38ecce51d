"""data/prepared/: what prepare hands to cache_latents. One JSON row per picture, sorted by file name.

manifest.jsonl  the rows        dataset.json  how they were made: preprocessing, augmentation, source
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.core import seeding
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
    """Relative to dataset.source, with forward slashes; ``a.tar::b.png`` or ``a.parquet::17`` inside of a file."""
    sha256: str
    """Of the picture's bytes."""
    caption: str
    """The first one, as it was written: what evidence is measured with."""
    captions: tuple[str, ...]
    """What training draws from, one per step."""
    split: Split
    source_width: int
    """Of the picture itself, after EXIF rotation."""
    source_height: int
    width: int
    """Of the picture that the model sees, in pixels."""
    height: int
    mask: str | None = None
    """None for all of it, ``alpha``, or the name of a mask's file."""
    mask_sha256: str | None = None
    repeats: int = 1
    loss_weight: float = 1.0
    regularization: bool = False


@dataclass(frozen=True)
class Augmentation:
    """How the variants of a picture differ."""

    crop: Literal["center", "random"]
    flip: bool
    seed: int

    def views(self, item: Item, num_variants: int) -> tuple[View, ...]:
        """At most ``num_variants`` distinct views: crops in turn, each mirrored next if ``flip``.

        View i is the same whatever the number, so that more variants add to the cache and change nothing in it.
        """
        mirrors = (False, True) if self.flip else (False,)
        drawn = (divmod(index, len(mirrors)) for index in range(num_variants))
        return tuple(dict.fromkeys(View(self._crop(item, crop), mirrors[mirror]) for crop, mirror in drawn))

    def _crop(self, item: Item, index: int) -> tuple[int, int, int, int]:
        """The largest box of the target's shape, slid along the picture's longer side."""
        width, height = item.source_width, item.source_height
        if width * item.height > height * item.width:
            width = round(height * item.width / item.height)
        else:
            height = round(width * item.height / item.width)
        slack = (item.source_width - width) + (item.source_height - height)  # one of them is 0
        if self.crop == "center":
            offset = slack // 2
        else:
            offset = seeding.key(self.seed, "crop", item.sha256, index) % (slack + 1)
        left, top = (offset, 0) if item.source_width > width else (0, offset)
        return left, top, left + width, top + height


@dataclass(frozen=True)
class Manifest:
    items: list[Item]
    preprocessing: dict[str, Any]
    """What, beside the bytes, decides the pixels: filter, background colour, version. Part of every cache key."""
    augmentation: Augmentation
    unmasked_weight: float
    """Weight of the loss where a mask is black."""
    source: str
    """dataset.source, for the stage that reads the pictures again. Part of no cache key."""

    def save(self, folder: Path) -> None:
        rows = sorted(self.items, key=lambda item: item.file_name)
        lines = [json.dumps(asdict(item), sort_keys=True, ensure_ascii=False) for item in rows]
        dataset = {
            "preprocessing": self.preprocessing,
            "augmentation": asdict(self.augmentation),
            "unmasked_weight": self.unmasked_weight,
            "source": self.source,
        }
        write_json(folder / "dataset.json", dataset)
        write_text(folder / "manifest.jsonl", "\n".join(lines) + "\n")  # last: it says that the folder is whole

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        path = folder / "manifest.jsonl"
        for needed in (path, folder / "dataset.json"):
            if not needed.exists():
                raise UserError(f"{needed}: no such file; run `python -m stages.prepare` first")
        with understood(path, "stages.prepare"):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            items = [Item(**row | {"captions": tuple(row["captions"])}) for row in rows]
            if not items:
                raise ValueError("no rows")
            dataset = read_json(folder / "dataset.json")
            dataset["augmentation"] = Augmentation(**dataset["augmentation"])
            return cls(items, **dataset)
