"""What near-duplicates are recognized by: a thumbnail of each image, and the details of a sparse drawing."""

from __future__ import annotations

import base64
import zlib

import numpy as np
from PIL import Image

from lora_dag.pictures.decode import flat

THUMBNAIL = (17, 16)  # width, height: 16 x 16 differences of neighbours
DETAIL = 256  # pixels, both sides: what a thumbnail loses of a drawing of few thin strokes
SPARSE_BITS = 24  # of a thumbnail's 256: with fewer, different small words on white are near-duplicates of each other
MAX_SPARSE_BITS = 40  # up to which the detail is kept, so that a sparse picture's look-alikes have one too
DETAIL_LEVELS = 8  # either side of the background: products of two details are exact in float32
FLAT = 2.0  # of 255: the noise of a JPEG that shows nothing
MAX_DETAIL_BYTES = 8192  # a drawing's are a few hundred, those of a smooth photograph 30,000


def thumbnail_pixels(thumbnail: str) -> np.ndarray:
    """uint8 [16, 17, 3] of ``Checked.thumbnail``."""
    width, height = THUMBNAIL
    return np.frombuffer(base64.b64decode(thumbnail), np.uint8).reshape(height, width, 3)


def gradient_bits(pixels: np.ndarray) -> np.ndarray:
    """Where the grey of a pixel is larger than its left neighbour's: bool [..., 256], row by row.

    Grey is rounded ITU-R 601 luma, as Pillow's mode L: an even area, such as a white background, gives zeros.

    Args:
        pixels: uint8 [..., 16, 17, 3].

    Source: N. Krawetz, "Kind of Like That" (hackerfactor.com, 2013): dHash, there of 9 x 8 pixels.
    """
    grey = (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16  # [..., 16, 17]
    bits = grey[..., 1:] > grey[..., :-1]
    return bits.reshape(*bits.shape[:-2], -1)


def detail(full: Image.Image) -> str:
    """How a picture differs from its background, the median: int8 [256, 256, 3] of -8 to 8, compressed, in base64.

    Scaled to its largest difference, so that a faint drawing is as clear as a black one; empty for photographs, which
    do not compress.
    """
    plain = flat(full, "#ffffff", by_profile=False)
    plain = plain.reduce(max(1, min(plain.size) // (4 * DETAIL)))
    size = (DETAIL, DETAIL)
    small = [channel.convert("F").resize(size, Image.Resampling.BILINEAR) for channel in plain.split()]
    difference = np.stack([np.asarray(channel, np.float64) for channel in small], axis=-1)  # [256, 256, 3]
    difference -= np.median(difference, axis=(0, 1))
    largest = np.abs(difference).max()
    levels = np.round(difference / largest * DETAIL_LEVELS) if largest > FLAT else np.zeros_like(difference)
    packed = zlib.compress(levels.astype(np.int8).tobytes(), 9)
    return base64.b64encode(packed).decode("ascii") if len(packed) <= MAX_DETAIL_BYTES else ""


def detail_pixels(detail: str) -> np.ndarray:
    """int8 [256, 256, 3] of ``Checked.detail``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(detail)), np.int8).reshape(DETAIL, DETAIL, 3)
