from __future__ import annotations

import base64
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from lora_dag.images.checks import check_image
from lora_dag.images.perceptual_hash import detail_pixels
from stages.prepare.near_duplicates import _colors, _distances, group_labels
from tests.helpers.images import DEFAULTS, encoded, photo
from tests.helpers.workspace import REPOSITORY

BITS = DEFAULTS["near_duplicate_bits"]


def thumbnail(blob: bytes) -> str:
    return check_image(blob, "x.png", False).thumbnail


def scene(seed: int) -> Image.Image:
    return photo(seed, 480, 360)


def crop(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    x, y = round(width * share / 2), round(height * share / 2)
    return image.crop((x, y, width - x, height - y))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda image: encoded(image, "JPEG", quality=75),
    "WebP": lambda image: encoded(image, "WEBP", quality=70),
    "half": lambda image: encoded(image.resize((240, 180), Image.Resampling.LANCZOS)),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.05)),
    "more contrast": lambda image: encoded(ImageEnhance.Contrast(image).enhance(1.1)),
    "cropped 1 %": lambda image: encoded(crop(image, 0.01)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_photographs_are_found_and_other_photographs_are_not(name: str) -> None:
    originals = [thumbnail(encoded(scene(seed))) for seed in range(20)]
    copies = [thumbnail(COPIES[name](scene(seed))) for seed in range(20)]
    labels = group_labels(originals + copies, BITS, mirrored=False)
    assert len(set(labels[:20])) == 20
    assert sum(a == b for a, b in zip(labels[:20], labels[20:], strict=True)) >= 18


def icon(color: str, shape: str = "ellipse") -> str:
    image = Image.new("RGB", (128, 128), "white")
    getattr(ImageDraw.Draw(image), shape)((20, 30, 100, 110), fill=color, outline="black")
    return thumbnail(encoded(image))


def test_icons_of_one_outline_and_several_colors_are_not_taken_for_copies() -> None:
    colors = ["red", "blue", "green", "orange", "white", "black"]
    assert len(set(group_labels([icon(color) for color in colors], 64, mirrored=False))) == len(colors)
    labels = group_labels([icon("red"), icon("red", "rectangle"), icon("red")], 64, mirrored=False)
    assert labels[0] == labels[2] != labels[1]


@pytest.mark.parametrize("folder", ["raw", "raw-noto"])
def test_the_demos_icons_are_all_different(folder: str) -> None:
    paths = sorted((REPOSITORY / "data" / folder).glob("*.png"))
    if not paths:
        pytest.skip(f"data/{folder} is not pulled")
    thumbnails = [thumbnail(path.read_bytes()) for path in paths]
    assert len(set(group_labels(thumbnails, BITS, mirrored=False))) == len(paths) == 300


def test_mirrored_copies_need_the_option() -> None:
    originals = [thumbnail(encoded(scene(seed))) for seed in range(8)]
    mirrored = [thumbnail(encoded(ImageOps.mirror(scene(seed)))) for seed in range(8)]
    assert len(set(group_labels(originals + mirrored, BITS, mirrored=False))) == 16
    labels = group_labels(originals + mirrored, BITS, mirrored=True)
    assert labels[:8] == labels[8:] and len(set(labels)) == 8


def test_chains_are_one_group_in_any_order() -> None:
    """Each step of a slow pan is a copy of the one before, the last one not of the first."""
    wide = photo(3, 600, 360)
    pan = [thumbnail(encoded(wide.crop((x, 0, x + 480, 360)))) for x in range(0, 121, 4)]
    assert len(set(group_labels([pan[0], pan[-1]], BITS, mirrored=False))) == 2
    order = np.random.default_rng(0).permutation(len(pan))
    assert len(set(group_labels([pan[index] for index in order], BITS, mirrored=False))) == 1


def test_no_bits_still_finds_equal_thumbnails() -> None:
    assert group_labels([icon("red"), icon("red"), icon("blue", "rectangle")], 0, mirrored=False) == [0, 0, 2]
    assert group_labels([], BITS, mirrored=True) == []


def test_thousands_are_compared_in_seconds() -> None:
    """5,000 in a quarter of the time of 10,000, which took 1.3 s; blocks are compared with each other too."""
    draw = np.random.default_rng(0).integers(0, 256, (5000, 816), np.uint8)
    draw[4999] = draw[0]
    thumbnails = [base64.b64encode(row.tobytes()).decode() for row in draw]
    start = time.perf_counter()
    labels = group_labels(thumbnails, BITS, mirrored=False)
    assert time.perf_counter() - start < 10
    assert labels[4999] == labels[0] and len(set(labels)) == 4999


def test_distances_do_not_depend_on_other_images_or_order() -> None:
    """A pair at the threshold is on one side of it on every machine, whatever other images there are."""
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (200, 816)).astype(np.uint8)
    pixels[50:100] = pixels[:50] // 2 + 60  # less contrast
    pixels[0] = 200  # flat
    colors = _colors(pixels)
    found = _distances(colors, colors)
    order = draw.permutation(816)
    np.testing.assert_array_equal(_distances(colors[:, order], colors[:, order]), found)
    for row, column in draw.integers(0, 200, (300, 2)):
        pair = _distances(colors[row : row + 1], colors[column : column + 1])
        assert pair.item() == found[row, column]
    even = pixels - pixels.mean(axis=1, keepdims=True)
    even /= np.maximum(pixels.std(axis=1, keepdims=True), 4)
    expected = np.sqrt(((even[:, None] - even[None]) ** 2).mean(axis=-1))
    np.testing.assert_allclose(found, expected, atol=1e-7)


# Drawings of few thin strokes

WORDS = ["drum", "plum", "tree", "stone", "river", "cloud", "house", "mouse", "horse", "table"]
WORDS += ["chair", "paper", "light", "night", "green", "brown", "train", "plane", "ocean", "beach"]


def word(text: str, side: int, size: int, color: str = "black", mirrored: bool = False) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text((side / 2, side / 2), text, color, ImageFont.load_default(size), anchor="mm")
    return ImageOps.mirror(image) if mirrored else image


def labels_of(blobs: list[bytes], mirrored: bool = False) -> list[int]:
    found = [check_image(blob, "x.png", False) for blob in blobs]
    return group_labels([each.thumbnail for each in found], BITS, mirrored, [each.detail for each in found])


@pytest.mark.parametrize(("side", "size"), [(512, 14), (512, 28), (512, 60), (1024, 28)])
def test_words_match_only_their_copies(side: int, size: int) -> None:
    """Thumbnails alone would make all of them near-duplicates of each other."""
    originals = [word(text, side, size) for text in WORDS]
    copies = {
        "JPEG": [COPIES["JPEG"](image) for image in originals],
        "half": [encoded(image.resize((side // 2, side // 2), Image.Resampling.LANCZOS)) for image in originals],
        "more contrast": [COPIES["more contrast"](image) for image in originals],
        "cropped 1 %": [COPIES["cropped 1 %"](image) for image in originals],
    }
    for name, blobs in copies.items():
        labels = labels_of([*map(encoded, originals), *blobs])
        assert len(set(labels[:20])) == 20
        assert sum(a == b for a, b in zip(labels[:20], labels[20:], strict=True)) >= 18, name


def test_small_marks_differ_by_place_and_color() -> None:
    def mark(x: int, y: int, color: str) -> bytes:
        image = Image.new("RGB", (600, 600), "white")
        ImageDraw.Draw(image).ellipse((x, y, x + 14, y + 14), fill=color)
        return encoded(image)

    marks = [mark(x, y, color) for x, y in ((100, 100), (108, 100), (400, 300)) for color in ("red", "blue", "green")]
    labels = labels_of([*marks, *marks])
    assert len(set(labels[:9])) == 9 and labels[:9] == labels[9:]


def test_mirrored_words() -> None:
    originals = [encoded(word(text, 512, 28)) for text in WORDS[:8]]
    mirrored = [encoded(word(text, 512, 28, mirrored=True)) for text in WORDS[:8]]
    assert len(set(labels_of(originals + mirrored))) == 16
    labels = labels_of(originals + mirrored, mirrored=True)
    assert labels[:8] == labels[8:] and len(set(labels)) == 8


def test_blank_images_are_copies_of_each_other_and_of_nothing_else() -> None:
    blank = [encoded(Image.new("RGB", (512, 512), "white")), encoded(Image.new("RGB", (300, 300), "white"), "JPEG")]
    labels = labels_of([*blank, encoded(word("drum", 512, 28))])
    assert labels[0] == labels[1] != labels[2]


def test_only_sparse_images_have_details() -> None:
    assert check_image(encoded(scene(1)), "x.png", False).detail == ""
    detail = check_image(encoded(word("drum", 1024, 60)), "x.png", False).detail
    assert 0 < len(detail) < 2000
    pixels = detail_pixels(detail)
    assert (pixels.shape, pixels.min(), pixels.max()) == ((256, 256, 3), -8, 0)
    faint = check_image(encoded(word("drum", 1024, 60, "#d0d0d0")), "x.png", False).detail
    assert np.abs(detail_pixels(faint).astype(int) - pixels).max() <= 1
