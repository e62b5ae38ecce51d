"""From masks to what the loss looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.artifacts.manifest import Augmentation, View
from lora_dag.images.decode import load_view, preprocessing
from lora_dag.images.masks import load_mask
from tests.helpers.images import encoded, photo
from tests.helpers.odd_images import item, turned


def patterned(width: int, height: int) -> Image.Image:
    """RGBA whose opacity is also its red channel: so the visible pixels give the expected mask."""
    red = np.asarray(photo(4, width, height))[..., 0]
    return Image.fromarray(np.stack([red, red // 2, red // 3, red], axis=-1))


@pytest.mark.parametrize("kind", ["alpha", "file"])
@pytest.mark.parametrize(("width", "height"), [(96, 72), (72, 96)])
def test_masks_line_up_with_views(kind: Any, width: int, height: int) -> None:
    image = patterned(width, height)
    colors = encoded(image.convert("RGB"))
    mask = encoded(image if kind == "alpha" else image.getchannel("R"))
    target = item(40, 32, (width, height), "alpha" if kind == "alpha" else "m.png")
    views = Augmentation("random", flip=True, seed=3).views(target, 4)
    assert len({view.crop for view in views}) == 2 and views[1].flip
    made = preprocessing("#ffffff", "bilinear")
    for view in views:
        array = load_mask(mask, target, view, made, kind)
        assert (array.dtype, array.shape) == (np.float32, (32, 40))
        expected = np.asarray(load_view(colors, target, view, made))[..., 0]
        np.testing.assert_allclose(array * 255, expected, atol=1)


def test_a_mask_of_another_size_is_scaled() -> None:
    target, made = item(32, 32, (96, 64), "m.png"), preprocessing("#ffffff", "lanczos")
    image = photo(5, 96, 64).convert("L")
    small = encoded(image.resize((48, 32), Image.Resampling.BOX))
    for view in Augmentation("random", flip=True, seed=0).views(target, 4):
        full = load_mask(encoded(image), target, view, made, "file")
        np.testing.assert_allclose(load_mask(small, target, view, made, "file"), full, atol=0.08)
    edge = View((32, 0, 96, 64), False)
    assert load_mask(encoded(Image.new("L", (97, 64), 255)), target, edge, made, "file").min() == 1


def test_masks_at_their_edges() -> None:
    target, made = item(8, 8, (16, 16), "m.png"), preprocessing("#ffffff", "lanczos")
    whole = View((0, 0, 16, 16), False)

    def mask(image: Image.Image, kind: Any, **options: Any) -> np.ndarray:
        return load_mask(encoded(image, **options), target, whole, made, kind)

    assert mask(Image.new("RGB", (16, 16)), "alpha").min() == 1
    assert mask(Image.new("RGBA", (16, 16), (255, 255, 255, 0)), "file").max() == 0  # nothing is there to look at
    half = Image.new("1", (16, 16))
    half.paste(1, (8, 0, 16, 16))
    sharp = mask(half, "file")
    assert (sharp[:, 0].max(), sharp[:, -1].min()) == (0, 1)
    assert mask(half, "file", exif=turned(6))[0].max() == 0  # turned clockwise: black above
    np.testing.assert_allclose(mask(Image.fromarray(np.full((16, 16), 32896, np.uint16)), "file"), 128 / 255)


def test_masks_do_not_ring() -> None:
    """Lanczos would give weights below 0 and above 1 beside an edge."""
    half = Image.new("L", (64, 64), 80)
    half.paste(160, (31, 0, 64, 64))
    array = load_mask(encoded(half), item(24, 24, (64, 64)), View((0, 0, 64, 64), False), {}, "file") * 255
    assert array.min() > 79.9 and array.max() < 160.1
