"""data/prepared/: what prepare hands to cache_latents. One JSON row per picture, sorted by file name.

manifest.jsonl  the rows        dataset.json  how they were made: preprocessing, augmentation, source
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lora_dag.core import seeding
from lora_dag.core.console import UserError
from lora_dag.core.files import replaced, understood, write_json, write_text

Split = Literal["train", "heldout"]
Pixels = Annotated[int, Field(gt=0)]
Preprocessing = dict[str, str | int]


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
    """Of the picture's bytes."""
    caption: str
    """The first one, as it was written: what evidence is measured with."""
    captions: Annotated[tuple[str, ...], Field(min_length=1)]
    """What training draws from, one per step."""
    split: Split
    source_width: Pixels
    """Of the picture itself, after EXIF rotation."""
    source_height: Pixels
    width: Pixels
    """Of the picture that the model sees, in pixels."""
    height: Pixels
    mask: str | None = None
    """None for all of it, ``alpha``, or the name of a mask's file."""
    mask_sha256: str | None = None
    repeats: Annotated[int, Field(ge=1)] = 1
    loss_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    regularization: bool = False
    transparent: bool = True
    """Has transparent pixels; where False the background colour decides nothing."""


def natural_key(file_name: str) -> list[tuple[int, int, str]]:
    """Sorts ``a9.png`` before ``a10.png``, and line 9 of a file before line 10."""
    parts = re.split(r"(\d+)", file_name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


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
    preprocessing: Preprocessing
    """What, beside the bytes, decides the pixels: filter, background colour, version. Part of every cache key."""
    augmentation: Augmentation
    unmasked_weight: float
    """Weight of the loss where a mask is black."""
    source: str
    """dataset.source, for the stage that reads the pictures again. Part of no cache key."""

    def save(self, folder: Path) -> None:
        """Write the folder anew, whole."""
        rows = sorted(self.items, key=lambda item: item.file_name)
        lines = [json.dumps(asdict(item), sort_keys=True, ensure_ascii=False) for item in rows]
        dataset = Dataset(self.preprocessing, self.augmentation, self.unmasked_weight, self.source)
        with replaced(folder) as aside:
            write_json(aside / "dataset.json", asdict(dataset))
            write_text(aside / "manifest.jsonl", "\n".join(lines) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        path, described = folder / "manifest.jsonl", folder / "dataset.json"
        for needed in (path, described):
            if not needed.exists():
                raise UserError(f"{needed}: no such file; run `python -m stages.prepare` first")
        with understood(path, "stages.prepare"):
            # Captions may hold U+2028 and its like, which str.splitlines takes for ends of lines.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            items = [ITEM.validate_json(line, strict=True) for line in lines]
            if len({item.file_name for item in items}) < len(items):
                raise ValueError("a picture stands there twice")
        with understood(described, "stages.prepare"):
            dataset = DATASET.validate_json(described.read_text(encoding="utf-8"), strict=True)
        return cls(items, dataset.preprocessing, dataset.augmentation, dataset.unmasked_weight, dataset.source)


@dataclass(frozen=True)
class Dataset:
    """dataset.json: the fields of Manifest beside the items."""

    preprocessing: Preprocessing
    augmentation: Augmentation
    unmasked_weight: float
    source: str


ITEM, DATASET = TypeAdapter(Item), TypeAdapter(Dataset)
