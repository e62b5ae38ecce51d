"""Manifests of small images, built by hand: what prepare would have made of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from lora_dag.artifacts.manifest import Augmentation, Item, Manifest
from lora_dag.images.decode import preprocessing

CENTER = Augmentation("center", flip=False, seed=0)


def item_of(folder: Path, file_name: str, **changes: Any) -> Item:
    """An item of an image in ``folder``: 32 x 32 pixels, captioned by its name, to train on."""
    blob = (folder / file_name).read_bytes()
    with Image.open(io.BytesIO(blob)) as image:
        width, height = image.size
    caption = changes.pop("caption", f"an image of {Path(file_name).stem}")
    values: dict[str, Any] = {
        "file_name": file_name,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "caption": caption,
        "captions": (caption,),
        "split": "train",
        "source_width": width,
        "source_height": height,
        "width": 32,
        "height": 32,
    }
    return Item(**values | changes)


def manifest_of(folder: Path, items: list[Item]) -> Manifest:
    return Manifest(items, preprocessing("#ffffff", "lanczos"), CENTER, 0.0, str(folder))


def reader(folder: Path) -> Callable[[str], bytes]:
    return lambda file_name: (folder / file_name).read_bytes()
