"""Checks of image files: refusals and warnings."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_dag.images import file_formats
from lora_dag.images.file_formats import has_wrong_suffix
from tests.helpers.errors import assert_is
from tests.helpers.images import encoded
from tests.helpers.odd_images import (
    RAMP16,
    checked,
    chunk,
    deep_png,
    deep_tiff,
    frames,
    gray16,
    png,
    refusal,
    rgba,
    seen,
    turned,
)
from tests.helpers.workspace import make_image


@pytest.mark.parametrize("form", file_formats.FORMATS)
def test_format_is_identified_by_content(form: str) -> None:
    found = checked(encoded(make_image(1, 30, 20), form))
    assert (found.format, found.width, found.height, found.remarks) == (form, 30, 20, ())
    assert (found.alpha, found.has_alpha) == (None, False)
    assert has_wrong_suffix("a/b.PNG", found.format) == (form != "PNG")
    assert not has_wrong_suffix("a", found.format)


def test_mpo_is_a_jpeg_and_no_animation() -> None:
    found = checked(frames("MPO"))
    assert (found.format, found.remarks) == ("JPEG", ())
    assert not has_wrong_suffix("x.jpg", found.format)


def corrupt(blob: bytes, place: float = 0.5) -> bytes:
    index = int(len(blob) * place)
    return blob[:index] + bytes([blob[index] ^ 0x10]) + blob[index + 1 :]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (b"", ("image-empty", "'x.png'")),
        (b"\xef\xbb\xbf <!DOCTYPE html><html>", ("image-format-unsupported", "'x.png'", "HTML")),
        (b'<?xml version="1.0"?><svg/>', ("image-format-unsupported", "SVG")),
        (b"version https://git-lfs.github.com/spec/v1\n", ("image-format-unsupported", "Git LFS pointer")),
        (b"\0\0\0\x1cftypheic", ("image-format-unsupported", "HEIC or AVIF")),
        (b"just text", ("image-format-unsupported", "JPEG, PNG, WebP, GIF, TIFF or BMP")),
        (encoded(NOISE, "JPEG")[:3], ("image-damaged", "'x.png'", "JPEG")),
        (encoded(NOISE, "JPEG")[:-200], ("image-damaged", "'x.png'", "image file is truncated")),
        (encoded(NOISE)[:-200], ("image-damaged", "'x.png'")),
        (encoded(NOISE, "WEBP", lossless=True)[:-200], ("image-damaged", "'x.png'")),
        (encoded(NOISE, "GIF")[:-200], ("image-damaged", "'x.png'")),
        (encoded(NOISE, "TIFF")[:-2000], ("image-damaged", "'x.png'")),
        (encoded(NOISE, "BMP")[:-200], ("image-damaged", "'x.png'")),
        (corrupt(encoded(NOISE)), ("image-damaged", "broken PNG file (bad header checksum in b'IDAT')")),
        (png(20_000, 20_000), ("image-too-large", "'x.png'", "80,000,000")),
        (png(10_000, 10_000), ("image-too-large", "10000 x 10000", "80,000,000", "65,535")),
        (png(9_000, 9_000), ("image-too-large", "9000 x 9000", "80,000,000")),
        (png(100, 70_000), ("image-too-large", "100 x 70000", "65,535")),
        (png(8, 8, chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(10**8)))), ("image-damaged", "Decompressed data")),
        (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), ("image-pixels-unsupported", "type F")),
        (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), ("image-pixels-unsupported", "of 32 bits")),
        (encoded(Image.new("LAB", (8, 8)), "TIFF"), ("image-pixels-unsupported", "type LAB", "RGB")),
        (encoded(gray16(), transparency=7), ("image-pixels-unsupported", "16-bit gray", "8 bits")),
        (
            deep_png(chunk(b"tRNS", struct.pack(">HHH", 65535, 32768, 257))),
            ("image-pixels-unsupported", "16-bit color", "8 bits"),
        ),
        (
            deep_tiff(2, np.stack([RAMP16] * 3), planar=True),
            ("image-pixels-unsupported", "separate planes", "8 bits"),
        ),
        (
            deep_tiff(0, RAMP16[None]),
            ("image-pixels-unsupported", "0 is white", "8 bits"),
        ),
    ],
)  # fmt: skip
def test_unusable_images_are_refused(blob: bytes, expected: tuple[str, ...], recwarn: pytest.WarningsRecorder) -> None:
    assert_is(refusal(blob), *expected)
    assert not [warning for warning in recwarn if "PIL" not in warning.filename]


def test_only_verify_finds_a_flipped_byte_in_a_png() -> None:
    """The case that makes verify() necessary: the decoder itself shows some other image."""
    blob = encoded(Image.new("RGB", (64, 64), (94, 94, 94)), compress_level=0)
    broken = corrupt(blob)
    assert_is(refusal(broken), "image-damaged", "checksum")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused_or_the_first_is_taken(form: str) -> None:
    blob = frames(form)
    assert_is(refusal(blob), "image-animated", "'x.png'", "dataset.first_frame")
    assert checked(blob, first_frame=True).remarks == ("image-first-frame",)
    array = seen(blob, 8, (0, 0, 8, 8))
    assert array[..., 0].min() > 200 and array[..., 2].max() < 60


def test_12_bit_gray_would_be_dark() -> None:
    blob = encoded(Image.new("L", (8, 8), 200), "TIFF", compression="raw")
    entry = struct.pack("<HHI", 258, 3, 1)
    at = blob.index(entry)
    data = blob[: at + 8] + struct.pack("<I", 12) + blob[at + 12 :] + bytes(64)
    assert_is(refusal(data), "image-pixels-unsupported", "type I;16 of 12 bits", "8 or 16 bits")


@pytest.mark.parametrize(
    ("image", "form", "remark"),
    [
        (Image.new("CMYK", (8, 8)), "JPEG", "image-cmyk"),
        (Image.new("1", (8, 8), 1), "PNG", "image-one-bit"),
        (
            Image.new("RGBA", (8, 8)),
            "PNG",
            "image-transparent",
        ),
    ],
)
def test_remarks(image: Image.Image, form: str, remark: str) -> None:
    assert checked(encoded(image, form)).remarks == (remark,)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_image(form: str) -> None:
    for orientation in range(1, 9):
        found = checked(encoded(make_image(1, 30, 20), form, exif=turned(orientation)))
        assert (found.width, found.height) == ((30, 20) if orientation < 5 else (20, 30))


def test_opacity() -> None:
    assert (checked(encoded(rgba())).alpha, checked(encoded(rgba())).has_alpha) == ((0, 236), True)
    opaque = checked(encoded(make_image(1).convert("RGBA")))
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
