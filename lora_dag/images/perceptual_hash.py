"""Perceptual hashes, by which near-duplicates are found: a thumbnail of each image, and details of sparse drawings."""

from __future__ import annotations

import base64
import zlib

import numpy as np
from PIL import Image

from lora_dag.images.decode import flat

THUMBNAIL = (17, 16)  # width, height: 16 x 16 differences of neighbors
DETAIL = 256  # pixels per side: keeps thin strokes of a drawing, which a thumbnail loses
SPARSE_BITS = 24  # of 256 hash bits: with fewer, different small words on white look like near-duplicates
MAX_SPARSE_BITS = 40  # images up to here have a detail, so that copies of a sparse image have one too
DETAIL_LEVELS = 8  # above and below the background: products of two details are exact in float32
FLAT = 2.0  # of 255: noise of an empty JPEG
MAX_DETAIL_BYTES = 8192  # a drawing has a few hundred, a smooth photograph 30,000


def thumbnail_pixels(thumbnail: str) -> np.ndarray:
    """Return uint8 [16, 17, 3] from ``ImageFacts.thumbnail``."""
    width, height = THUMBNAIL
    return np.frombuffer(base64.b64decode(thumbnail), np.uint8).reshape(height, width, 3)


def gradient_bits(pixels: np.ndarray) -> np.ndarray:
    """Return whether each pixel is lighter than its left neighbor: bool [..., 256], row by row.

    Gray is rounded ITU-R 601 luma, as Pillow's mode L: an even area, such as a white background, gives zeros.

    Args:
        pixels: uint8 [..., 16, 17, 3].

    Source: N. Krawetz, "Kind of Like That" (hackerfactor.com, 2013): dHash, there of 9 x 8 pixels.
    """
    gray = (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16  # [..., 16, 17]
    bits = gray[..., 1:] > gray[..., :-1]
    return bits.reshape(*bits.shape[:-2], -1)


def detail(full: Image.Image) -> str:
    """Return the difference of an image to its median color: int8 [256, 256, 3] of -8 to 8, compressed, in base64.

    The difference is scaled to its largest value, so that a faint drawing is as clear as a black one. The result is
    empty for photographs, which do not compress.
    """
    flattened = flat(full, "#ffffff", by_profile=False)
    flattened = flattened.reduce(max(1, min(flattened.size) // (4 * DETAIL)))
    size = (DETAIL, DETAIL)
    small = [channel.convert("F").resize(size, Image.Resampling.BILINEAR) for channel in flattened.split()]
    difference = np.stack([np.asarray(channel, np.float64) for channel in small], axis=-1)  # [256, 256, 3]
    difference -= np.median(difference, axis=(0, 1))
    largest = np.abs(difference).max()
    levels = np.round(difference / largest * DETAIL_LEVELS) if largest > FLAT else np.zeros_like(difference)
    packed = zlib.compress(levels.astype(np.int8).tobytes(), 9)
    return base64.b64encode(packed).decode("ascii") if len(packed) <= MAX_DETAIL_BYTES else ""


def detail_pixels(detail: str) -> np.ndarray:
    """Return int8 [256, 256, 3] from ``ImageFacts.detail``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(detail)), np.int8).reshape(DETAIL, DETAIL, 3)
