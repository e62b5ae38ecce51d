from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stages.artifacts.manifest import Item, View
from stages.core.pictures import chroma, dark_share, load_view, preprocessing, save_png, sheet
from tests.conftest import picture


def item(width: int, height: int) -> Item:
    return Item("x.png", "", "", "train", width, height, ())


def seen(
    path: Path, size: int, crop: tuple[int, int, int, int], flip: bool = False, background: str = "#ffffff"
) -> np.ndarray:
    image = load_view(path, item(size, size), View(crop, flip), preprocessing(background))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# load_view


def test_view_is_the_cropped_and_resized_picture(tmp_path: Path) -> None:
    picture(3, 60, 40).save(tmp_path / "x.png")
    whole = picture(3, 60, 40)
    expected = whole.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    actual = seen(tmp_path / "x.png", 32, (10, 0, 50, 40))
    # At the crop's edge the filter also sees the pixels beyond it.
    np.testing.assert_allclose(actual[:, 3:-3], np.asarray(expected)[:, 3:-3], atol=1)
    same = seen(tmp_path / "x.png", 40, (10, 0, 50, 40))
    np.testing.assert_array_equal(same, np.asarray(whole)[:, 10:50])
    np.testing.assert_array_equal(seen(tmp_path / "x.png", 40, (10, 0, 50, 40), flip=True), same[:, ::-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(tmp_path / "x.png")
    array = seen(tmp_path / "x.png", 8, (0, 0, 8, 8), background="#ff0000")
    assert array[0, 0].tolist() == [0, 0, 0]
    assert array[0, 7].tolist() == [255, 0, 0]


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    array = seen(tmp_path / "x.png", 8, (0, 0, 8, 8))
    np.testing.assert_allclose(array[..., 0], ramp / 257, atol=0.5)


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("1", 255), ("CMYK", 128)])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, value: int) -> None:
    colour = (0, 0, 0, 255 - value) if mode == "CMYK" else value
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8), colour).save(path)
    np.testing.assert_allclose(seen(path, 8, (0, 0, 8, 8)), value, atol=2)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))
    image.save(tmp_path / "x.png", exif=exif)
    array = seen(tmp_path / "x.png", 8, (0, 0, 8, 8))
    assert array[:, 7].max() == 0
    assert array[:, 0].min() == 255


def test_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=profile)
    np.testing.assert_allclose(seen(tmp_path / "srgb.png", 8, (0, 0, 8, 8))[0, 0], (200, 60, 60), atol=1)
    image.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert seen(tmp_path / "broken.png", 8, (0, 0, 8, 8))[0, 0].tolist() == [200, 60, 60]


# Measures


def test_measures_look_at_the_foreground_only() -> None:
    array = np.full((10, 10, 3), 255, np.uint8)
    array[:, :2] = (200, 100, 50)
    array[:, 2:4] = (10, 10, 30)
    assert chroma(array) == pytest.approx((150 + 20) / 2)
    assert dark_share(array) == pytest.approx(0.5)
    assert chroma(array[:, :2]) == pytest.approx(150)


def test_measures_at_their_edges() -> None:
    blank = np.full((4, 4, 3), 240, np.uint8)
    assert (chroma(blank), dark_share(blank)) == (0.0, 0.0)
    assert chroma(np.full((1, 1, 3), (255, 255, 239), np.uint8)) == 16
    assert dark_share(np.full((1, 1, 3), 63, np.uint8)) == 1
    assert dark_share(np.full((1, 1, 3), 64, np.uint8)) == 0


# Sheets


def test_pictures_stand_unchanged_in_a_grid_that_text_leaves_free() -> None:
    cells = [[Image.new("RGB", (32, 32), (10 * row, 10 * column, 77)) for column in range(3)] for row in range(2)]
    long = "a very long label that cannot possibly fit into so small a cell, whatever is done"
    result = np.asarray(sheet(cells, [long, "b"], ["one", long, "three"], 32, "A title", [["x", long, "y"]] * 2))
    places = []
    for row in range(2):
        for column in range(3):
            inner = (result == (10 * row, 10 * column, 77)).all(axis=-1)
            y, x = np.nonzero(inner)
            assert len(y) == 30 * 30  # all but the one-pixel outline
            places.append((y.min(), x.min()))
    assert len({y for y, _ in places}) == 2
    assert len({x for _, x in places}) == 3


def test_missing_pictures_leave_their_cell_empty() -> None:
    black = Image.new("RGB", (16, 16))
    full = sheet([[black, black], [black, black]], None, None, 16)
    holes = sheet([[black, None], [black]], None, None, 16)
    assert holes.size == full.size
    assert (np.asarray(holes)[:, -20:] == 255).all()


def test_wide_pictures_keep_their_shape() -> None:
    result = np.asarray(sheet([[Image.new("RGB", (64, 32), "red")]], None, None, 32))
    assert (result == (255, 0, 0)).all(axis=-1).sum() == 32 * 16 - 2 * 16


def test_png_bytes_depend_on_pixels_alone(tmp_path: Path) -> None:
    image = picture(1)
    save_png(tmp_path / "a.png", image)
    image.info["comment"] = "made today"
    save_png(tmp_path / "b.png", image)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as loaded:
        assert loaded.info == {}
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_png_is_kept_under_its_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    save_png(tmp_path / "free.png", Image.fromarray(noise))
    save_png(tmp_path / "small.png", Image.fromarray(noise), 4000)
    assert (tmp_path / "free.png").stat().st_size > 12_000
    assert (tmp_path / "small.png").stat().st_size <= 4000
    assert zlib.crc32((tmp_path / "small.png").read_bytes()[12:29]) == int.from_bytes(
        (tmp_path / "small.png").read_bytes()[29:33], "big"
    )
