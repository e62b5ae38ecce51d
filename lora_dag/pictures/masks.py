"""From the bytes of a mask, or of an image with an alpha channel, to what the loss looks at."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from lora_dag.pictures.decode import eight_bits, upright
from lora_dag.pictures.formats import FORMATS

if TYPE_CHECKING:
    from lora_dag.artifacts.manifest import Item, View


def load_mask(
    blob: bytes, item: Item, view: View, preprocessing: dict[str, Any], kind: Literal["alpha", "file"]
) -> np.ndarray:
    """How much the loss looks at each pixel of a view: float32 [item.height, item.width], 0 to 1.

    Args:
        blob: the picture's bytes for ``alpha``: its opacity, 1 where it has no alpha channel;
            those of its mask for ``file``: luminance, black where transparent. The mask may have another size.
        preprocessing: the manifest's; its filter is for colours and could ring below 0 here.
    """
    return cut_mask(decode_mask(blob, kind), item, view)


def decode_mask(blob: bytes, kind: Literal["alpha", "file"]) -> Image.Image:
    """The whole mask, upright, mode L: what the masks of all views are cut from."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        full = upright(image)
    if kind == "file":
        return luminance(full)
    return full.getchannel("A") if full.mode in ("LA", "RGBA") else Image.new("L", full.size, 255)


def cut_mask(channel: Image.Image, item: Item, view: View) -> np.ndarray:
    """float32 [item.height, item.width], 0 to 1, from a decoded mask."""
    across, down = channel.width / item.source_width, channel.height / item.source_height
    left, top, right, bottom = view.crop
    box = (left * across, top * down, min(right * across, channel.width), min(bottom * down, channel.height))
    seen = channel.resize((item.width, item.height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(ImageOps.mirror(seen) if view.flip else seen, np.float32) / 255


def luminance(image: Image.Image) -> Image.Image:
    """Mode L, black where transparent; profiles are for colours and play no part."""
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "#000000"), image.convert("RGBA"))
    return eight_bits(image).convert("L")
