"""Decoding and cropping: from the bytes of an image to the pixels that the model sees, deterministically."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from lora_dag.images.file_formats import FORMATS

if TYPE_CHECKING:
    from lora_dag.artifacts.manifest import Item, View

VERSION = 2  # version of the computation, in every cache key: raise it when the pixels of load_view change
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

warnings.filterwarnings("ignore", module=r"PIL\.")  # check_image refuses the relevant cases with messages of its own


def preprocessing(background: str, image_interpolation_mode: str) -> dict[str, Any]:
    """Return the settings that, with the bytes and the view, determine the pixels of ``load_view``."""
    return {"background": background.lower(), "filter": image_interpolation_mode, "version": VERSION}


def load_view(blob: bytes, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """Return one view of an image as the model sees it: RGB of ``item.width`` x ``item.height``.

    Args:
        preprocessing: ``Manifest.preprocessing``.
    """
    return cut_view(decode(blob, preprocessing), item, view, preprocessing)


def decode(blob: bytes, preprocessing: dict[str, Any]) -> Image.Image:
    """Return the whole image, upright and in sRGB. All views are cut from it."""
    with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        return to_rgb(image, preprocessing["background"])


def cut_view(whole: Image.Image, item: Item, view: View, preprocessing: dict[str, Any]) -> Image.Image:
    """Return one view of a decoded image: RGB of ``item.width`` x ``item.height``."""
    seen = whole.resize((item.width, item.height), FILTERS[preprocessing["filter"]], box=view.crop)
    return ImageOps.mirror(seen) if view.flip else seen


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Return the image upright by EXIF, in sRGB with 8 bits, on ``background`` (#rrggbb) where transparent."""
    return flat(upright(image), background)


def upright(image: Image.Image) -> Image.Image:
    """Return the image upright by EXIF, without a palette, in mode L, I;16, RGB or CMYK, or LA or RGBA.

    These are the modes that a color profile can belong to: ``flat`` applies the profile before it converts to RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image if image.mode == "I;16" else image.convert("I").convert("I;16")  # without "I", Pillow clips to 255
    is_gray = image.mode in ("1", "L", "LA", "La")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("LA" if is_gray else "RGBA")
    if image.mode == "CMYK":
        return image
    return image.convert("L" if is_gray else "RGB")


def flat(image: Image.Image, background: str, by_profile: bool = True) -> Image.Image:
    """Return RGB: colors converted from the embedded profile to sRGB, then transparent pixels on ``background``."""
    colors = image.convert(image.mode.removesuffix("A"))
    result = to_srgb(colors, image.info.get("icc_profile")) if by_profile else None
    result = eight_bits(colors).convert("RGB") if result is None else result
    if image.mode in ("LA", "RGBA"):
        result.putalpha(image.getchannel("A"))
        result = Image.alpha_composite(Image.new("RGBA", image.size, background), result)
    return result.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I;16":
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))  # Pillow would clip


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Return RGB converted by an embedded ICC profile. None without a profile that fits and is intact.

    Browsers ignore an unfit profile too. They also read gray with a profile for RGB as three equal channels.

    Args:
        image: L, I;16, RGB or CMYK.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":
            image = eight_bits(image).convert("RGB") if image.mode in ("L", "I;16") else image
        # Little CMS shortens a gray curve to a table that is wrong by up to 10 of 255 in the dark of a linear one.
        flags = ImageCms.Flags.NOOPTIMIZE if image.mode in ("L", "I;16") else ImageCms.Flags.NONE
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
