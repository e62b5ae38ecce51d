"""One look at the bytes of an image: verified and decoded to the last pixel, and refused where it would be misread."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image

from lora_dag.core.console import UserError
from lora_dag.pictures.decode import flat, to_srgb, upright
from lora_dag.pictures.formats import FORMATS, unidentified
from lora_dag.pictures.likeness import MAX_SPARSE_BITS, THUMBNAIL, detail, gradient_bits
from lora_dag.pictures.masks import luminance

MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"}
MAX_PIXELS = 80_000_000  # a few KB of PNG can claim more, and Pillow itself refuses from 179 million only
MAX_SIDE = 65_535  # of a JPEG
SEVERAL = "have several frames or pages, of which the first is taken"


@dataclass(frozen=True)
class Checked:
    """What one look at a picture's bytes tells; a function of the bytes alone."""

    width: int
    """After EXIF rotation, as is the height."""
    height: int
    format: str
    """By content: a key of ``SUFFIXES``."""
    alpha: tuple[int, int] | None
    """Smallest and largest opacity of a pixel, 0 to 255; None without an alpha channel."""
    lightest: int
    """Largest luminance, 0 to 255, laid on black where transparent: 0 for a mask that hides everything."""
    thumbnail: str
    """RGB of 17 x 16 pixels, laid on white, uint8 in base64: what near-duplicates are told by."""
    detail: str
    """For ``detail_pixels`` where the thumbnail shows almost nothing of a drawing; else empty."""
    warnings: tuple[str, ...]
    """What is allowed but seldom meant, as a predicate of several pictures: "are CMYK and converted to sRGB"."""

    @property
    def has_alpha(self) -> bool:
        """Some pixel lets the background through."""
        return self.alpha is not None and self.alpha[0] < 255


def check_picture(blob: bytes, name: str, first_frame: bool) -> Checked:
    """What the bytes hold, verified and decoded to the last pixel.

    A JPEG that was cut and then given an end mark is not told from a whole one, nor is one with some damaged blocks:
    libjpeg fills the rest with grey, warns, and Pillow drops the warning.

    Args:
        name: for messages; the format is told by content. See ``misnamed``.
        first_frame: take the first of several frames or pages.

    Raises:
        UserError: it cannot be read, has several frames, is too large, or has pixels that would be misread.
        MemoryError: the machine's fault or that of broken bytes, which cannot be told apart; names the picture.
    """
    if not blob:
        raise UserError(f"'{name}' is an empty file; restore it or remove it")
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            found = refuse(image, first_frame)
            image.verify()  # a flipped byte in a PNG shows here only
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            image.load()
            return describe(image, found)
    except UserError as error:
        raise UserError(f"'{name}' {error}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"'{name}' {unidentified(blob)}") from None
    except Image.DecompressionBombError:
        raise UserError(f"'{name}' claims too many pixels; at most {MAX_PIXELS:,} are read, scale it down") from None
    except Exception as error:  # decoders raise what they like on broken bytes
        if isinstance(error, MemoryError) or "out of memory" in str(error):  # Pillow makes an OSError of it
            raise MemoryError(f"out of memory while '{name}' was decoded") from error
        what = " ".join(str(error).split()).rstrip(".")[:120]
        raise UserError(f"'{name}' is damaged ({what}); restore it or remove it") from None


def refuse(image: Image.Image, first_frame: bool) -> list[str]:
    """Warnings about a picture that was opened but not decoded.

    Raises:
        UserError: a predicate, for the caller to put the name before.
    """
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(
            f"has {width} x {height} pixels; at most {MAX_PIXELS:,} and {MAX_SIDE:,} a side are read, scale it down"
        )
    # Phones write JPEGs with a preview behind the picture (MPO); those are no animation.
    several = getattr(image, "is_animated", False) and image.format != "MPO"
    if several and not first_frame:
        raise UserError(
            "is animated or has several pages; save one as a picture, or set dataset.first_frame to true for the first"
        )
    if image.mode not in MODES or odd_depth(image):
        cure = "save it with 8 or 16 bits per channel" if image.mode[0] in "IF" else "save it as RGB"
        raise UserError(f"has pixels of type {image.mode}{odd_depth(image)}; {cure}")
    if wrong := misread(image):
        raise UserError(f"is {wrong}; save it with 8 bits")
    found = {
        "are CMYK and converted to sRGB": image.mode == "CMYK",
        "have 1 bit per pixel, black or white": image.mode == "1",
        SEVERAL: several,
        "state another gamma than sRGB's, which is ignored; save them with a colour profile": odd_gamma(image),
    }
    return [text for text, applies in found.items() if applies]


def odd_gamma(image: Image.Image) -> bool:
    """A PNG's gAMA chunk, which counts only where neither a profile nor an sRGB chunk does."""
    gamma = image.info.get("gamma")
    stronger = {"icc_profile", "srgb"} & image.info.keys()
    return gamma is not None and not stronger and abs(gamma * 2.2 - 1) > 0.05


def odd_depth(image: Image.Image) -> str:
    """`` of 12 bits`` for a TIFF whose grey Pillow would show much too dark: it reads 12 bits as 16."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return f" of {bits[0]} bits" if image.mode.startswith("I") and tuple(bits) != (16,) else ""


def misread(image: Image.Image) -> str | None:
    """Which of the pictures of 16 bits per channel it is that Pillow opens and shows wrong, as noise or a negative."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(284) == 2 and max(tags.get(258, (8,))[1:], default=8) > 8:
        return "a TIFF with 16-bit colours in separate planes"
    if tags.get(262) == 0 and image.mode.startswith("I"):
        return "a TIFF of 16-bit grey in which 0 is white"
    # A shade's 16 bits are compared with the 8 that are left of each pixel.
    if "transparency" in image.info and any("16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return f"16-bit {'grey' if image.mode.startswith('I') else 'colour'} with a transparent shade"
    return None


def describe(image: Image.Image, found: list[str]) -> Checked:
    full = upright(image)
    alpha = extrema(full.getchannel("A")) if full.mode in ("LA", "RGBA") else None
    if alpha == (0, 0):
        found = [*found, "are transparent all over, so that only dataset.background is seen"]
    # Before colours are converted, which takes long; bilinear weighs pixels by a triangle twice as wide as a cell.
    tiny = full.resize(THUMBNAIL, Image.Resampling.BILINEAR)
    small = flat(tiny, "#ffffff")
    profile = full.info.get("icc_profile")
    if profile and to_srgb(tiny.convert(tiny.mode.removesuffix("A")), profile) is None:
        found = [*found, "have a colour profile that is broken or of other colours than theirs, and is ignored"]
    return Checked(
        *full.size,
        format="JPEG" if image.format == "MPO" else str(image.format),
        alpha=alpha,
        lightest=extrema(luminance(full))[1],
        thumbnail=base64.b64encode(small.tobytes()).decode("ascii"),
        detail=detail(full) if gradient_bits(np.asarray(small)).sum() <= MAX_SPARSE_BITS else "",
        warnings=tuple(found),
    )


def extrema(channel: Image.Image) -> tuple[int, int]:
    return cast(tuple[int, int], channel.getextrema())  # of one band
