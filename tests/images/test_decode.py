"""From bytes to what the model sees."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.artifacts.manifest import View
from lora_dag.images import decode
from lora_dag.images.decode import load_view, preprocessing
from lora_dag.images.perceptual_hash import thumbnail_pixels
from tests.helpers.images import encoded
from tests.helpers.odd_images import (
    RAMP16,
    checked,
    chunk,
    deep_png,
    deep_tiff,
    gray16,
    gray_profile,
    item,
    rgba,
    seen,
    srgb,
    turned,
)
from tests.helpers.workspace import make_image


@pytest.mark.parametrize(
    ("image", "form", "options", "digest"),
    [
        (lambda: make_image(3, 60, 40), "PNG", {}, "7ddce8be333dc0bb"),
        (rgba, "PNG", {}, "5435db133b41117c"),
        (rgba, "WEBP", {"lossless": True}, "5435db133b41117c"),
        (lambda: rgba().convert("LA"), "PNG", {}, "a8a01c343a23afff"),
        (lambda: make_image(3, 60, 40).convert("L"), "PNG", {}, "f130f496b5c56745"),
        (lambda: rgba().quantize(16), "PNG", {}, "8c00ecbb00708db3"),
        (lambda: make_image(3, 60, 40).convert("1"), "PNG", {}, "e0873bedf141ac32"),
        (gray16, "PNG", {}, "443452234dd73052"),
        (lambda: make_image(3, 60, 40), "PNG", {"exif": turned(6)}, "313b4a93b76267c2"),
        (lambda: make_image(3, 60, 40), "PNG", {"icc_profile": srgb()}, "7ddce8be333dc0bb"),
        (lambda: make_image(3, 60, 40), "PNG", {"transparency": (0, 0, 111)}, "2200c72af87bd4a7"),
    ],
    ids=["RGB", "RGBA", "WebP", "LA", "L", "P", "1", "I;16", "turned", "profile", "key"],
)
def test_pixels_are_those_of_version_2(
    image: Callable[[], Image.Image], form: str, options: dict[str, Any], digest: str
) -> None:
    """Stored latents are of these pixels: who changes them raises ``decode.VERSION`` and these digests."""
    assert decode.VERSION == 2
    view = View((0, 0, 38, 38), True)
    shown = load_view(encoded(image(), form, **options), item(32, 32), view, preprocessing("#FF8000", "lanczos"))
    assert hashlib.sha256(shown.tobytes()).hexdigest()[:16] == digest


def test_preprocessing_of_this_version_stays() -> None:
    """It is in the key of every cached latent."""
    assert preprocessing("#FFFFFF", "lanczos") == {"background": "#ffffff", "filter": "lanczos", "version": 2}


def test_view_is_the_cropped_and_resized_image() -> None:
    whole = make_image(3, 60, 40)
    blob = encoded(whole)
    expected = whole.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    actual = seen(blob, 32, (10, 0, 50, 40))
    # At the crop's edge the filter also sees the pixels beyond it.
    np.testing.assert_allclose(actual[:, 3:-3], np.asarray(expected)[:, 3:-3], atol=1)
    same = seen(blob, 40, (10, 0, 50, 40))
    np.testing.assert_array_equal(same, np.asarray(whole)[:, 10:50])
    np.testing.assert_array_equal(seen(blob, 40, (10, 0, 50, 40), flip=True), same[:, ::-1])


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
def test_filters(name: str) -> None:
    expected = make_image(3, 40).resize((16, 16), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(
        seen(encoded(make_image(3, 40)), 16, (0, 0, 40, 40), filter=name), np.asarray(expected)
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    blob = encoded(image.quantize(4) if mode == "P" else image.convert(mode))
    array = seen(blob, 8, (0, 0, 8, 8), background="#ff0000")
    assert array[0, 0].tolist() == [0, 0, 0]
    assert array[0, 7].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(form: str) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    array = seen(encoded(Image.fromarray(ramp), form), 8, (0, 0, 8, 8))
    np.testing.assert_array_equal(array[..., 0], np.round(ramp / 257))
    assert checked(encoded(Image.fromarray(ramp), form)).format == form


def test_16_bit_gray_of_the_other_byte_order_is_scaled() -> None:
    """Programs on processors of Motorola and IBM wrote such TIFF files. Pillow's mode is I;16B."""
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    blob = encoded(Image.frombytes("I;16B", (8, 8), ramp.astype(">u2").tobytes()), "TIFF")
    assert blob.startswith(b"MM")
    np.testing.assert_array_equal(seen(blob, 8, (0, 0, 8, 8))[..., 0], np.round(ramp / 257))
    assert checked(blob).lightest == 251


def test_16_bit_colors_keep_their_brightness() -> None:
    blob = deep_png()
    assert seen(blob, 1, (0, 0, 1, 1))[0, 0].tolist() == [255, 128, 1]
    assert checked(blob).remarks == ()


def test_16_bit_tiffs_that_are_read_right() -> None:
    """One plane, and interleaved planes."""
    np.testing.assert_array_equal(seen(deep_tiff(1, RAMP16[None]), 8, (0, 0, 8, 8))[..., 0], np.round(RAMP16 / 257))
    interleaved = seen(deep_tiff(2, np.stack([RAMP16, RAMP16 // 2, RAMP16 * 0])), 8, (0, 0, 8, 8))
    np.testing.assert_allclose(interleaved[..., 1], RAMP16 / 2 / 257, atol=1)
    for planes in (RAMP16[None], np.stack([RAMP16] * 3)):
        assert checked(deep_tiff(1 if len(planes) == 1 else 2, planes)).remarks == ()


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("1", 255), ("CMYK", 128)])
def test_other_modes_become_rgb(mode: str, value: int) -> None:
    color = (0, 0, 0, 255 - value) if mode == "CMYK" else value
    blob = encoded(Image.new(mode, (8, 8), color), "JPEG" if mode == "CMYK" else "PNG")
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), value, atol=2)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))
    array = seen(encoded(image, exif=turned(6)), 8, (0, 0, 8, 8))  # shown turned clockwise by a quarter
    assert array[:, 7].max() == 0
    assert array[:, 0].min() == 255


def test_embedded_profile_is_converted_to_srgb() -> None:
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    np.testing.assert_allclose(seen(encoded(image, icc_profile=srgb()), 8, (0, 0, 8, 8))[0, 0], (200, 60, 60), atol=1)
    assert seen(encoded(image, icc_profile=b"no profile"), 8, (0, 0, 8, 8))[0, 0].tolist() == [200, 60, 60]


def from_linear(linear: float) -> float:
    """The sRGB shade, 0 to 255, of a linear one (IEC 61966-2-1)."""
    share = linear / 255
    return 255 * (12.92 * share if share <= 0.0031308 else 1.055 * share ** (1 / 2.4) - 0.055)


def deep(shade: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), shade * 257, np.uint16))


@pytest.mark.parametrize("shade", [2, 20, 64, 200])
@pytest.mark.parametrize(
    ("image", "form", "options"),
    [
        (lambda shade: Image.new("L", (8, 8), shade), "PNG", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "TIFF", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "JPEG", {"quality": 100}),
        (lambda shade: Image.new("LA", (8, 8), (shade, 255)), "PNG", {}),
        (lambda shade: Image.new("LA", (8, 8), (shade, 255)), "TIFF", {}),
        (lambda shade: Image.new("L", (8, 8), shade), "PNG", {"transparency": 77}),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
    ],
    ids=["L", "L TIFF", "L JPEG", "LA", "LA TIFF", "L with tRNS", "16-bit PNG", "16-bit TIFF"],
)
def test_gray_profile_is_applied_in_every_mode(
    image: Callable[[int], Image.Image], form: str, options: dict[str, Any], shade: int
) -> None:
    blob = encoded(image(shade), form, icc_profile=gray_profile(), **options)
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), from_linear(shade), atol=1)
    np.testing.assert_allclose(thumbnail_pixels(checked(blob).thumbnail), from_linear(shade), atol=1)
    assert checked(blob).remarks == ()
    assert shade != 64 or round(from_linear(shade)) == 137


def test_16_bit_gray_keeps_its_depth_until_the_profile_is_applied() -> None:
    """Between the linear shades 0 and 1 of 8 bits lie 13 of sRGB."""
    ramp = np.arange(0, 640, 10, dtype=np.uint16).reshape(8, 8)
    array = seen(encoded(Image.fromarray(ramp), icc_profile=gray_profile()), 8, (0, 0, 8, 8))[..., 0]
    expected = np.vectorize(from_linear)(ramp / 257)
    np.testing.assert_allclose(array, expected, atol=1)
    assert len(np.unique(array)) > 20


def test_profile_does_not_change_opacity() -> None:
    half = Image.new("LA", (8, 8), (64, 128))
    array = seen(encoded(half, icc_profile=gray_profile()), 8, (0, 0, 8, 8))
    np.testing.assert_allclose(array, 137 * 128 / 255 + 255 * 127 / 255, atol=1.5)  # on white
    assert checked(encoded(half, icc_profile=gray_profile())).alpha == (128, 128)


def swapped() -> bytes:
    """A profile in which blue is red."""
    return srgb().replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)), "PNG"),
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)), "TIFF"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "PNG"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "TIFF"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)), "WEBP"),
        (lambda: Image.new("RGB", (8, 8), (200, 60, 60)).quantize(4), "PNG"),
        (lambda: Image.new("RGBA", (8, 8), (200, 60, 60, 255)).quantize(4), "PNG"),
    ],
    ids=["RGB", "TIFF", "RGBA", "RGBA TIFF", "WebP", "P", "P with tRNS"],
)
def test_color_profile_is_applied_in_every_mode(image: Callable[[], Image.Image], form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    blob = encoded(image(), form, icc_profile=swapped(), **options)
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8))[0, 0], (60, 60, 200), atol=1)


def test_gray_under_a_profile_for_rgb() -> None:
    blob = encoded(Image.new("L", (8, 8), 64), icc_profile=srgb())
    np.testing.assert_allclose(seen(blob, 8, (0, 0, 8, 8)), 64, atol=1)
    assert checked(blob).remarks == ()


@pytest.mark.parametrize(
    ("mode", "form", "profile"),
    [
        ("RGB", "PNG", gray_profile()),
        ("RGBA", "PNG", gray_profile()),
        ("P", "PNG", gray_profile()),
        ("CMYK", "TIFF", srgb()),
        ("CMYK", "TIFF", gray_profile()),
        ("L", "PNG", b"no profile"),
        ("RGB", "JPEG", b"no profile"),
    ],
)
def test_unfit_color_profiles_are_warned_about(mode: str, form: str, profile: bytes) -> None:
    plain, with_profile = (encoded(Image.new(mode, (8, 8)), form, **options)
                           for options in ({}, {"icc_profile": profile}))  # fmt: skip
    assert checked(with_profile).remarks == (*checked(plain).remarks, "image-profile-ignored")
    np.testing.assert_array_equal(seen(with_profile, 8, (0, 0, 8, 8)), seen(plain, 8, (0, 0, 8, 8)))


@pytest.mark.parametrize(("gamma", "is_odd"), [(45455, False), (100_000, True)])
def test_a_gamma_without_a_profile(gamma: int, is_odd: bool) -> None:
    remarks = checked(deep_png(chunk(b"gAMA", struct.pack(">I", gamma)))).remarks
    assert ("image-gamma-ignored" in remarks) == is_odd
