"""Checks of an image's bytes: verify the file, decode every pixel, and refuse kinds that Pillow misreads."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image

from lora_dag.core.console import Problem, UserError
from lora_dag.images.decode import flat, to_srgb, upright
from lora_dag.images.file_formats import FORMATS, unidentified_problem
from lora_dag.images.masks import luminance
from lora_dag.images.perceptual_hash import MAX_SPARSE_BITS, THUMBNAIL, detail, gradient_bits

MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"}
MAX_PIXELS = 80_000_000  # a PNG of a few KB can claim more, and Pillow itself refuses only from 179 million
MAX_SIDE = 65_535  # of a JPEG

REMARKS = {
    problem.code: problem
    for problem in (
        Problem("image-cmyk", "are CMYK and are converted to sRGB."),
        Problem("image-one-bit", "have 1 bit per pixel, black or white."),
        Problem("image-first-frame", "have several frames or pages, of which the first is used."),
        Problem("image-gamma-ignored", "state another gamma than sRGB's, which is ignored. Save with a color profile."),
        Problem("image-transparent", "are fully transparent, so only dataset.background is visible."),
        Problem("image-profile-ignored", "have a color profile that is broken or unfit and is ignored."),
    )
}
"""Code -> warning about usable images, as a predicate of several images."""


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image, computed from its bytes alone."""

    width: int
    """Pixels after EXIF rotation, as the height."""
    height: int
    format: str
    """Key of ``SUFFIXES``, from the content."""
    alpha: tuple[int, int] | None
    """Smallest and largest opacity of a pixel, 0 to 255. None without an alpha channel."""
    lightest: int
    """Largest luminance, 0 to 255, on black where transparent. It is 0 for a mask that hides everything."""
    thumbnail: str
    """RGB of 17 x 16 pixels on white, uint8 in base64, for the search of near-duplicates."""
    detail: str
    """Input of ``detail_pixels`` for a drawing with an almost empty thumbnail. Empty for other images."""
    remarks: tuple[str, ...]
    """Codes of ``REMARKS`` that apply."""

    @property
    def has_alpha(self) -> bool:
        """Whether some pixel is not fully opaque."""
        return self.alpha is not None and self.alpha[0] < 255


def check_image(blob: bytes, name: str, first_frame: bool) -> ImageFacts:
    """Return the facts about an image after verifying the file and decoding every pixel.

    A JPEG that was cut off and then given an end mark passes, and so does one with some damaged blocks: libjpeg fills
    the rest with gray and warns, and Pillow drops the warning.

    Args:
        name: the image's name in messages. The content alone decides the format.
        first_frame: use the first of several frames or pages.

    Raises:
        UserError: the image cannot be read, has several frames, is too large, or has pixels that Pillow misreads.
        MemoryError: the machine has too little memory, or the bytes are broken. The message names the image.
    """
    if not blob:
        raise UserError(Problem("image-empty", f"'{name}' is an empty file. Restore it or remove it."))
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            require_supported(image, first_frame)
            remarks = header_remarks(image)
            image.verify()  # only this finds a flipped byte in a PNG
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            image.load()
            return describe(image, remarks)
    except UserError as error:
        raise error.about(f"'{name}'") from None
    except Image.UnidentifiedImageError:
        raise UserError(unidentified_problem(blob).about(f"'{name}'")) from None
    except Image.DecompressionBombError:
        text = f"'{name}' claims more than {MAX_PIXELS:,} pixels, which is the limit. Scale it down."
        raise UserError(Problem("image-too-large", text)) from None
    except Exception as error:  # decoders raise errors of any class on broken bytes
        if isinstance(error, MemoryError) or "out of memory" in str(error):  # Pillow makes an OSError of it
            raise MemoryError(f"out of memory while '{name}' was decoded") from error
        reason = " ".join(str(error).split()).rstrip(".")[:120]
        text = f"'{name}' is damaged ({reason}). Restore it or remove it."
        raise UserError(Problem("image-damaged", text)) from None


def require_supported(image: Image.Image, first_frame: bool) -> None:
    """Refuse an image by its header, before it is decoded.

    Raises:
        UserError: unsupported size, frames or pixels. The text is a predicate: the caller puts the name before it.
    """
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} per side are read"
        raise UserError(Problem("image-too-large", f"has {width} x {height} pixels, but {limits}. Scale it down."))
    if has_several_frames(image) and not first_frame:
        raise UserError(
            Problem(
                "image-animated",
                "is animated or has several pages. Save one of them as an image, or set dataset.first_frame to true.",
            )
        )
    if image.mode not in MODES or unusual_depth(image):
        fix = "Save it with 8 or 16 bits per channel." if image.mode[0] in "IF" else "Save it as RGB."
        text = f"has pixels of the unsupported type {image.mode}{unusual_depth(image)}. {fix}"
        raise UserError(Problem("image-pixels-unsupported", text))
    if kind := misread_kind(image):
        text = f"is {kind}, which would be decoded to wrong colors. Save it with 8 bits per channel."
        raise UserError(Problem("image-pixels-unsupported", text))


def header_remarks(image: Image.Image) -> list[str]:
    """Return the codes of ``REMARKS`` that the header of an image decides."""
    applies = {
        "image-cmyk": image.mode == "CMYK",
        "image-one-bit": image.mode == "1",
        "image-first-frame": has_several_frames(image),
        "image-gamma-ignored": has_unusual_gamma(image),
    }
    return [code for code, is_true in applies.items() if is_true]


def has_several_frames(image: Image.Image) -> bool:
    # Phones write JPEGs with a preview behind the image (MPO), which is no animation.
    return getattr(image, "is_animated", False) and image.format != "MPO"


def has_unusual_gamma(image: Image.Image) -> bool:
    """Return whether a PNG's gAMA chunk differs from sRGB. A color profile or an sRGB chunk overrides the chunk."""
    gamma = image.info.get("gamma")
    stronger = {"icc_profile", "srgb"} & image.info.keys()
    return gamma is not None and not stronger and abs(gamma * 2.2 - 1) > 0.05


def unusual_depth(image: Image.Image) -> str:
    """Return `` of 12 bits`` for a TIFF of 12-bit gray, which Pillow reads as 16 bits and much too dark, else ""."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return f" of {bits[0]} bits" if image.mode.startswith("I") and tuple(bits) != (16,) else ""


def misread_kind(image: Image.Image) -> str | None:
    """Return the name of a kind with 16 bits per channel that Pillow decodes to noise or a negative, else None."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(284) == 2 and max(tags.get(258, (8,))[1:], default=8) > 8:
        return "a TIFF with 16-bit colors in separate planes"
    if tags.get(262) == 0 and image.mode.startswith("I"):
        return "a TIFF of 16-bit gray in which 0 is white"
    # Pillow compares the 16 bits of the transparent shade with the 8 bits that are left of each pixel.
    if "transparency" in image.info and any("16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return f"16-bit {'gray' if image.mode.startswith('I') else 'color'} with a transparent shade"
    return None


def describe(image: Image.Image, remarks: list[str]) -> ImageFacts:
    """Return the facts about a decoded image.

    Args:
        remarks: codes that its header decided.
    """
    full = upright(image)
    alpha = extrema(full.getchannel("A")) if full.mode in ("LA", "RGBA") else None
    if alpha == (0, 0):
        remarks = [*remarks, "image-transparent"]
    # Resized before colors are converted, which is slow; bilinear weighs pixels by a triangle twice as wide as a cell.
    tiny = full.resize(THUMBNAIL, Image.Resampling.BILINEAR)
    small = flat(tiny, "#ffffff")
    profile = full.info.get("icc_profile")
    if profile and to_srgb(tiny.convert(tiny.mode.removesuffix("A")), profile) is None:
        remarks = [*remarks, "image-profile-ignored"]
    return ImageFacts(
        *full.size,
        format="JPEG" if image.format == "MPO" else str(image.format),
        alpha=alpha,
        lightest=extrema(luminance(full))[1],
        thumbnail=base64.b64encode(small.tobytes()).decode("ascii"),
        detail=detail(full) if gradient_bits(np.asarray(small)).sum() <= MAX_SPARSE_BITS else "",
        remarks=tuple(remarks),
    )


def extrema(channel: Image.Image) -> tuple[int, int]:
    return cast(tuple[int, int], channel.getextrema())  # of one band
