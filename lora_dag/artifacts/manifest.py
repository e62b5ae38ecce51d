"""data/prepared/: the output of prepare, the input of cache_latents. One JSON row per image, sorted by file name.

manifest.jsonl  the rows        dataset.json  preprocessing, augmentation, source
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import artifact_errors, replaced, write_json, write_text

Split = Literal["train", "heldout"]
Pixels = Annotated[int, Field(gt=0)]
Preprocessing = dict[str, str | int]


@dataclass(frozen=True)
class View:
    """A view of an image: a crop box in source pixels (after EXIF rotation), then optionally mirrored."""

    crop: tuple[int, int, int, int]
    """left, top, right, bottom"""
    flip: bool


@dataclass(frozen=True)
class Item:
    """One image of the dataset."""

    file_name: str
    """Relative to dataset.source, with forward slashes."""
    sha256: str
    """Digest of the image file."""
    caption: str
    """The first caption as written, which validate uses."""
    captions: Annotated[tuple[str, ...], Field(min_length=1)]
    """Captions that training draws from, one per step."""
    split: Split
    source_width: Pixels
    """Width of the original image after EXIF rotation."""
    source_height: Pixels
    width: Pixels
    """Width for the model, in pixels."""
    height: Pixels
    mask: str | None = None
    """``alpha``, the file name of a mask, or None without a mask."""
    mask_sha256: str | None = None
    repeats: Annotated[int, Field(ge=1)] = 1
    loss_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    regularization: bool = False
    transparent: bool = True
    """Whether there are transparent pixels; else the background color has no effect."""


def natural_key(file_name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``a9.png`` before ``a10.png``, and line 9 of a file before line 10."""
    parts = re.split(r"(\d+)", file_name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


@dataclass(frozen=True)
class Augmentation:
    """Settings of the variants of an image."""

    crop: Literal["center", "random"]
    flip: bool
    seed: int

    def views(self, item: Item, num_variants: int) -> tuple[View, ...]:
        """Return at most ``num_variants`` distinct views: each crop, then mirrored if ``flip``.

        View i does not depend on the number, so that more variants only add entries to the cache.
        """
        mirrors = (False, True) if self.flip else (False,)
        drawn = (divmod(index, len(mirrors)) for index in range(num_variants))
        return tuple(dict.fromkeys(View(self._crop(item, crop), mirrors[mirror]) for crop, mirror in drawn))

    def _crop(self, item: Item, index: int) -> tuple[int, int, int, int]:
        """Return the largest box with the target's aspect ratio, shifted along the image's longer side."""
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
    """Settings of decoding: filter, background color, version. Part of every cache key."""
    augmentation: Augmentation
    unmasked_weight: float
    """Weight of the loss in black areas of a mask."""
    source: str
    """dataset.source, where cache_latents reads the images. Not part of cache keys."""

    def save(self, folder: Path) -> None:
        """Replace the whole folder."""
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
                text = f"{needed}: no such file. Run `python -m stages.prepare` first."
                raise UserError(Problem("artifact-missing", text))
        with artifact_errors(path, "stages.prepare"):
            # Captions may contain U+2028, at which str.splitlines would split.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            items = [ITEM.validate_json(line, strict=True) for line in lines]
            if len({item.file_name for item in items}) < len(items):
                raise ValueError("an image is listed twice")
        with artifact_errors(described, "stages.prepare"):
            dataset = DATASET.validate_json(described.read_text(encoding="utf-8"), strict=True)
        return cls(items, dataset.preprocessing, dataset.augmentation, dataset.unmasked_weight, dataset.source)


@dataclass(frozen=True)
class Dataset:
    """Content of dataset.json: the fields of Manifest without the items."""

    preprocessing: Preprocessing
    augmentation: Augmentation
    unmasked_weight: float
    source: str


ITEM, DATASET = TypeAdapter(Item), TypeAdapter(Dataset)
