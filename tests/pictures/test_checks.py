"""What is refused, and what is warned of."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_dag.pictures import formats
from lora_dag.pictures.formats import misnamed
from tests.conftest import picture
from tests.helpers.images import encoded
from tests.helpers.odd_images import (
    RAMP16,
    checked,
    chunk,
    deep_png,
    deep_tiff,
    frames,
    grey16,
    png,
    refusal,
    rgba,
    seen,
    turned,
)


@pytest.mark.parametrize("form", formats.FORMATS)
def test_formats_are_told_by_content(form: str) -> None:
    found = checked(encoded(picture(1, 30, 20), form))
    assert (found.format, found.width, found.height, found.warnings) == (form, 30, 20, ())
    assert (found.alpha, found.has_alpha) == (None, False)
    assert misnamed("a/b.PNG", found.format) == (form != "PNG")
    assert not misnamed("a", found.format)


def test_mpo_is_a_jpeg_and_no_animation() -> None:
    found = checked(frames("MPO"))
    assert (found.format, found.warnings) == ("JPEG", ())
    assert not misnamed("x.jpg", found.format)


def corrupt(blob: bytes, place: float = 0.5) -> bytes:
    index = int(len(blob) * place)
    return blob[:index] + bytes([blob[index] ^ 0x10]) + blob[index + 1 :]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "'x.png' is an empty file; restore it or remove it"),
        (b"\xef\xbb\xbf <!DOCTYPE html><html>", " but seems to be HTML; convert it or remove it"),
        (b'<?xml version="1.0"?><svg/>', " but seems to be SVG; convert it or remove it"),
        (b"version https://git-lfs.github.com/spec/v1\n", " but seems to be Git LFS pointer; "),
        (b"\0\0\0\x1cftypheic", " but seems to be HEIC or AVIF; "),
        (b"just text", "'x.png' is no JPEG, PNG, WebP, GIF, TIFF or BMP picture; convert it or remove it"),
        (encoded(NOISE, "JPEG")[:3], "'x.png' is a damaged JPEG: its header cannot be read; restore it or remove it"),
        (encoded(NOISE, "JPEG")[:-200], "'x.png' is damaged (image file is truncated"),
        (encoded(NOISE)[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "WEBP", lossless=True)[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "GIF")[:-200], "'x.png' is damaged ("),
        (encoded(NOISE, "TIFF")[:-2000], "'x.png' is damaged ("),
        (encoded(NOISE, "BMP")[:-200], "'x.png' is damaged ("),
        (corrupt(encoded(NOISE)), "'x.png' is damaged (broken PNG file (bad header checksum in b'IDAT'))"),
        (png(20_000, 20_000), "'x.png' claims too many pixels; at most 80,000,000 are read, scale it down"),
        (png(10_000, 10_000), "'x.png' has 10000 x 10000 pixels; at most 80,000,000 and 65,535 a side are read"),
        (png(9_000, 9_000), "'x.png' has 9000 x 9000 pixels; at most 80,000,000"),
        (png(100, 70_000), "'x.png' has 100 x 70000 pixels; at most 80,000,000 and 65,535 a side are read"),
        (png(8, 8, chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(10**8)))), "'x.png' is damaged (Decompressed data"),
        (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "'x.png' has pixels of type F; save it with 8"),
        (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "'x.png' has pixels of type I of 32 bits; "),
        (encoded(Image.new("LAB", (8, 8)), "TIFF"), "'x.png' has pixels of type LAB; save it as RGB"),
        (encoded(grey16(), transparency=7), "'x.png' is 16-bit grey with a transparent shade; save it with 8 bits"),
        (
            deep_png(chunk(b"tRNS", struct.pack(">HHH", 65535, 32768, 257))),
            "'x.png' is 16-bit colour with a transparent shade; save it with 8 bits",
        ),
        (
            deep_tiff(2, np.stack([RAMP16] * 3), planar=True),
            "'x.png' is a TIFF with 16-bit colours in separate planes; save it with 8 bits",
        ),
        (
            deep_tiff(0, RAMP16[None]),
            "'x.png' is a TIFF of 16-bit grey in which 0 is white; save it with 8 bits",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(
    blob: bytes, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert message in refusal(blob)
    assert not [warning for warning in recwarn if "PIL" not in warning.filename]


def test_a_flipped_byte_in_a_png_is_seen_by_verify_alone() -> None:
    """The case that makes verify() necessary: the decoder itself shows some other picture."""
    blob = encoded(Image.new("RGB", (64, 64), (94, 94, 94)), compress_level=0)
    broken = corrupt(blob)
    assert "checksum" in refusal(broken)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused_or_the_first_is_taken(form: str) -> None:
    blob = frames(form)
    assert refusal(blob) == (
        "'x.png' is animated or has several pages; "
        "save one as a picture, or set dataset.first_frame to true for the first"
    )
    assert checked(blob, first_frame=True).warnings == ("have several frames or pages, of which the first is taken",)
    array = seen(blob, 8, (0, 0, 8, 8))
    assert array[..., 0].min() > 200 and array[..., 2].max() < 60


def test_12_bit_grey_would_be_dark() -> None:
    blob = encoded(Image.new("L", (8, 8), 200), "TIFF", compression="raw")
    entry = struct.pack("<HHI", 258, 3, 1)
    at = blob.index(entry)
    data = blob[: at + 8] + struct.pack("<I", 12) + blob[at + 12 :] + bytes(64)
    assert "has pixels of type I;16 of 12 bits; save it with 8 or 16 bits per channel" in refusal(data)


@pytest.mark.parametrize(
    ("image", "form", "warning"),
    [
        (Image.new("CMYK", (8, 8)), "JPEG", "are CMYK and converted to sRGB"),
        (Image.new("1", (8, 8), 1), "PNG", "have 1 bit per pixel, black or white"),
        (
            Image.new("RGBA", (8, 8)),
            "PNG",
            "are transparent all over, so that only dataset.background is seen",
        ),
    ],
)
def test_what_is_allowed_but_seldom_meant(image: Image.Image, form: str, warning: str) -> None:
    assert checked(encoded(image, form)).warnings == (warning,)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_picture(form: str) -> None:
    for orientation in range(1, 9):
        found = checked(encoded(picture(1, 30, 20), form, exif=turned(orientation)))
        assert (found.width, found.height) == ((30, 20) if orientation < 5 else (20, 30))


def test_opacity() -> None:
    assert (checked(encoded(rgba())).alpha, checked(encoded(rgba())).has_alpha) == ((0, 236), True)
    opaque = checked(encoded(picture(1).convert("RGBA")))
    assert (opaque.alpha, opaque.has_alpha) == ((255, 255), False)
    key = checked(encoded(Image.new("RGB", (8, 8), "red"), transparency=(255, 0, 0)))
    assert key.alpha == (0, 0)
    assert checked(encoded(rgba().convert("LA"))).has_alpha and checked(encoded(rgba().quantize(9))).has_alpha


def test_lightest_is_laid_on_black() -> None:
    assert checked(encoded(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))).lightest == 0
    dot = Image.new("L", (999, 999))
    dot.putpixel((500, 3), 255)
    assert checked(encoded(dot)).lightest == 255
    assert checked(encoded(Image.new("L", (8, 8)))).lightest == 0
