"""Gradient bits and thumbnails."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lora_dag.images.perceptual_hash import gradient_bits, thumbnail_pixels
from tests.helpers.images import encoded, photo
from tests.helpers.odd_images import checked, gray16, rgba, srgb, turned


def test_gradient_bits_against_a_plain_loop() -> None:
    thumbnail = checked(encoded(photo(1))).thumbnail
    gray = Image.fromarray(thumbnail_pixels(thumbnail)).convert("L")
    bits = [gray.getpixel((x + 1, y)) > gray.getpixel((x, y)) for y in range(16) for x in range(16)]  # type: ignore[operator]
    assert gradient_bits(thumbnail_pixels(thumbnail)).tolist() == bits
    assert not gradient_bits(thumbnail_pixels(checked(encoded(Image.new("RGB", (50, 50), "red"))).thumbnail)).any()


def test_thumbnails_are_upright_and_on_white() -> None:
    def thumbnail(blob: bytes) -> np.ndarray:
        return thumbnail_pixels(checked(blob).thumbnail).astype(int)

    image = photo(2, 170, 160)
    expected = np.asarray(image.resize((17, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(thumbnail(encoded(image)), expected)
    np.testing.assert_array_equal(thumbnail(encoded(image, icc_profile=srgb())), expected)
    upright = image.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(thumbnail(encoded(upright, exif=turned(6))), expected)
    on_white = Image.alpha_composite(Image.new("RGBA", (60, 40), "white"), rgba()).convert("RGB")
    np.testing.assert_allclose(thumbnail(encoded(rgba())), thumbnail(encoded(on_white)), atol=3)
    np.testing.assert_allclose(thumbnail(encoded(gray16()))[0, -1], 59_000 // 257, atol=8)
