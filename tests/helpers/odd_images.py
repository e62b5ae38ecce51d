"""Images of every kind that is read or refused, as bytes; and what the model sees of them."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_dag.artifacts.manifest import Item, View
from lora_dag.core.console import Problem, UserError
from lora_dag.images.checks import ImageFacts, check_image
from lora_dag.images.decode import load_view, preprocessing
from tests.helpers.images import encoded
from tests.helpers.workspace import make_image


def frames(form: str) -> bytes:
    """Red, then blue."""
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    return encoded(red, form, save_all=True, append_images=[blue])


def item(width: int, height: int, source: tuple[int, int] = (0, 0), mask: str | None = None) -> Item:
    return Item(
        "x.png", "ab" * 32, "", ("",), "train", *(source if source[0] else (width, height)), width, height, mask
    )


def seen(blob: bytes, size: int, crop: tuple[int, int, int, int], flip: bool = False, **changes: str) -> np.ndarray:
    made = preprocessing("#ffffff", "lanczos") | changes
    image = load_view(blob, item(size, size), View(crop, flip), made)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def checked(blob: bytes, first_frame: bool = False) -> ImageFacts:
    return check_image(blob, "x.png", first_frame)


def refusal(blob: bytes, first_frame: bool = False) -> Problem:
    with pytest.raises(UserError) as caught:
        checked(blob, first_frame)
    (problem,) = caught.value.problems
    assert "\n" not in problem and len(problem) < 240
    return problem


def rgba() -> Image.Image:
    """60 x 40, opaque on the right and transparent on the left."""
    image = make_image(3, 60, 40)
    image.putalpha(Image.fromarray((np.mgrid[0:40, 0:60][1] * 4).astype(np.uint8)))
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def gray16() -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray((x * 1000 + y * 7).astype(np.uint16))


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gray_profile(gamma: float = 1.0) -> bytes:
    """An ICC profile for one gray channel; Little CMS makes none through Pillow."""
    white = struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + table + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of a few bytes that claims any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((width // 8 + 1) * min(height, 100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deep_tiff(photometric: int, planes: np.ndarray, planar: bool = False) -> bytes:
    """A TIFF of 16 bits per channel, uint16 [channels, height, width]; Pillow itself writes neither of its kinds."""
    count, height, width = planes.shape
    data = (planes if planar else np.moveaxis(planes, 0, -1)).astype("<u2").tobytes()
    parts = count if planar else 1
    values = {
        **{256: [width], 257: [height], 258: [16] * count, 259: [1], 262: [photometric], 273: [0] * parts},
        **{277: [count], 278: [height], 279: [len(data) // parts] * parts, 284: [2 if planar else 1]},
    }
    end = 8 + 2 + 12 * len(values) + 4
    start = end + sum(4 * len(numbers) for numbers in values.values() if len(numbers) > 1)
    values[273] = [start + index * (len(data) // parts) for index in range(parts)]
    entries, more = b"", b""
    for tag, numbers in values.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack("<I", end + len(more))
        more += packed if len(numbers) > 1 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + more + data


def deep_png(*more: bytes) -> bytes:
    """One pixel of 16-bit colors."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 257)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixel + chunk(b"IEND", b"")


RAMP16 = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
