"""From the bytes of an image to the pixels that the model sees; the same input gives the same pixels."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from lora_dag.pictures.formats import FORMATS

if TYPE_CHECKING:
    from lora_dag.artifacts.manifest import Item, View

VERSION = 2  # of the way from bytes to pixels; part of every cache key, so raise it when load_view changes
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it, check_picture refuses in its own words


def preprocessing(background: str, image_interpolation_mode: str) -> dict[str, Any]:
    """What, beside the bytes and the view, decides the pixels that ``load_view`` returns."""
    return {"background": background.lower(), "filter": image_interpolation_mode, "version": VERSION}


def load_view(blob: bytes, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """One view of a picture as the model sees it: RGB of ``item.width`` x ``item.height``.

    Args:
        preprocessing: the manifest's.
    """
    return cut_view(decode(blob, preprocessing), item, view, preprocessing)


def decode(blob: bytes, preprocessing: dict[str, Any]) -> Image.Image:
    """The whole picture, upright, in sRGB: what all of its views are cut from."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        return to_rgb(image, preprocessing["background"])


def cut_view(whole: Image.Image, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """RGB of ``item.width`` x ``item.height`` from a decoded picture."""
    seen = whole.resize((item.width, item.height), FILTERS[preprocessing["filter"]], box=view.crop)
    return ImageOps.mirror(seen) if view.flip else seen


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Turned upright by EXIF, in sRGB, laid on ``background`` (#rrggbb) where transparent, 16-bit grey scaled to 8."""
    return flat(upright(image), background)


def upright(image: Image.Image) -> Image.Image:
    """Turned upright by EXIF, without a palette; mode L, I;16, RGB or CMYK, or LA or RGBA where it has transparency.

    These are the modes that a profile can belong to, so ``flat`` applies it before anything becomes RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image if image.mode == "I;16" else image.convert("I").convert("I;16")  # without "I", Pillow clips to 255
    is_grey = image.mode in ("1", "L", "LA", "La")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("LA" if is_grey else "RGBA")
    if image.mode == "CMYK":
        return image
    return image.convert("L" if is_grey else "RGB")


def flat(image: Image.Image, background: str, by_profile: bool = True) -> Image.Image:
    """From the embedded profile to sRGB, then on ``background``."""
    colours = image.convert(image.mode.removesuffix("A"))
    result = to_srgb(colours, image.info.get("icc_profile")) if by_profile else None
    result = eight_bits(colours).convert("RGB") if result is None else result
    if image.mode in ("LA", "RGBA"):
        result.putalpha(image.getchannel("A"))
        result = Image.alpha_composite(Image.new("RGBA", image.size, background), result)
    return result.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I;16":
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))  # Pillow would clip


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """RGB by an embedded ICC profile; None where there is none, or one that is broken or of another colour space.

    Browsers ignore such a profile too; they also read grey under a profile for RGB as three equal channels.

    Args:
        image: L, I;16, RGB or CMYK.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":
            image = eight_bits(image).convert("RGB") if image.mode in ("L", "I;16") else image
        # Little CMS shortens a grey curve to a table that is wrong by up to 10 of 255 in the dark of a linear one.
        flags = ImageCms.Flags.NOOPTIMIZE if image.mode in ("L", "I;16") else ImageCms.Flags.NONE
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
