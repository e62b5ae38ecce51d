from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from stages.core.sheets import cut, save_png, sheet
from tests.conftest import picture


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


def test_cut_gives_the_pictures_back() -> None:
    cells = [[picture(3 * row + column, 64) for column in range(3)] for row in range(2)]
    made = sheet(cells, ["one", "two"], ["a", "b", "c"], 64, "A title")
    for row, found in zip(cells, cut(made, 2, 3, 64), strict=True):
        for expected, actual in zip(row, found, strict=True):
            inner = np.asarray(actual)[1:-1, 1:-1]  # within the outline
            np.testing.assert_array_equal(inner, np.asarray(expected)[1:-1, 1:-1])
