"""Masks: from the bytes of a mask file, or of an image with an alpha channel, to the weights of the loss."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from lora_dag.images.decode import eight_bits, upright
from lora_dag.images.file_formats import FORMATS

if TYPE_CHECKING:
    from lora_dag.artifacts.manifest import Item, View


def load_mask(
    blob: bytes, item: Item, view: View, preprocessing: dict[str, Any], kind: Literal["alpha", "file"]
) -> np.ndarray:
    """Return the weight of the loss at each pixel of a view: float32 [item.height, item.width], 0 to 1.

    Args:
        blob: bytes of the image for ``alpha``: the weight is its opacity, or 1 without an alpha channel. Bytes of the
            mask for ``file``: the weight is its luminance, 0 where transparent. The mask may have another size.
        preprocessing: ``Manifest.preprocessing``. Its filter is not used: it could ring below 0.
    """
    return cut_mask(decode_mask(blob, kind), item, view)


def decode_mask(blob: bytes, kind: Literal["alpha", "file"]) -> Image.Image:
    """Return the whole mask, upright, in mode L. The masks of all views are cut from it."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        full = upright(image)
    if kind == "file":
        return luminance(full)
    return full.getchannel("A") if full.mode in ("LA", "RGBA") else Image.new("L", full.size, 255)


def cut_mask(channel: Image.Image, item: Item, view: View) -> np.ndarray:
    """Return the mask of one view from a decoded mask: float32 [item.height, item.width], 0 to 1."""
    across, down = channel.width / item.source_width, channel.height / item.source_height
    left, top, right, bottom = view.crop
    box = (left * across, top * down, min(right * across, channel.width), min(bottom * down, channel.height))
    seen = channel.resize((item.width, item.height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(ImageOps.mirror(seen) if view.flip else seen, np.float32) / 255


def luminance(image: Image.Image) -> Image.Image:
    """Return mode L, black where transparent. Color profiles are not applied."""
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "#000000"), image.convert("RGBA"))
    return eight_bits(image).convert("L")
