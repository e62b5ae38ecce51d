from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from lora_dag.pages.sheets import MAX_BYTES, cell_sides, cut, save_png, save_sheet, sheet
from tests.helpers.workspace import make_image


def test_images_stand_unchanged_in_a_grid_that_text_leaves_free() -> None:
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


def test_missing_images_leave_their_cell_empty() -> None:
    black = Image.new("RGB", (16, 16))
    full = sheet([[black, black], [black, black]], None, None, 16)
    holes = sheet([[black, None], [black]], None, None, 16)
    assert holes.size == full.size
    assert (np.asarray(holes)[:, -20:] == 255).all()


def test_wide_images_keep_their_shape() -> None:
    result = np.asarray(sheet([[Image.new("RGB", (64, 32), "red")]], None, None, 32))
    assert (result == (255, 0, 0)).all(axis=-1).sum() == 32 * 16 - 2 * 16


def test_png_bytes_depend_on_pixels_alone(tmp_path: Path) -> None:
    image = make_image(1)
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


def test_cut_gives_the_images_back() -> None:
    cells = [[make_image(3 * row + column, 64) for column in range(3)] for row in range(2)]
    made = sheet(cells, ["one", "two"], ["a", "b", "c"], 64, "A title")
    for row, found in zip(cells, cut(made, 2, 3, 64), strict=True):
        for expected, actual in zip(row, found, strict=True):
            inner = np.asarray(actual)[1:-1, 1:-1]  # within the outline
            np.testing.assert_array_equal(inner, np.asarray(expected)[1:-1, 1:-1])


# Sizes


def photograph(side: int, seed: int) -> Image.Image:
    """As hard to compress as one: soft shapes of all colors, and grain."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 16, (side, side, 1))
    return Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8))


def test_images_that_git_keeps_of_an_experiment_are_at_most_300_kb() -> None:
    assert sum(MAX_BYTES.values()) <= 300_000
    outs = {Path(next(iter(out))) for stage in read_dvc_yaml().values() for out in stage.get("plots", [])}
    assert {path.stem for path in outs if path.suffix == ".png"} == set(MAX_BYTES)


def read_dvc_yaml() -> dict[str, Any]:
    found = YAML(typ="safe").load(Path(__file__).parents[2] / "dvc.yaml")["stages"]
    return dict(found)


@pytest.mark.slow
def test_photographs_shrink_until_they_fit(tmp_path: Path) -> None:
    """Eight rows of three images of 512 pixels: not refused, not in eight colors, the same bytes again."""
    rows = [[photograph(512, 3 * row + column) for column in range(3)] for row in range(8)]
    sides = cell_sides(512, 256)
    assert sides == [32, 48, 64, 96, 128, 192, 256]

    def draw(side: int) -> Image.Image:
        return sheet(rows, [f"prompt {i}" for i in range(8)], ["base", "x 0.5", "x 1"], side)

    cell = save_sheet(tmp_path / "a.png", draw, sides, MAX_BYTES["samples"])
    assert save_sheet(tmp_path / "b.png", draw, sides, MAX_BYTES["samples"]) == cell
    blob = (tmp_path / "a.png").read_bytes()
    assert blob == (tmp_path / "b.png").read_bytes() and len(blob) <= MAX_BYTES["samples"]
    assert cell in (64, 96, 128)
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("RGB").getcolors() or []) > 60
        assert [len(row) for row in cut(image, 8, 3, cell)] == [3] * 8


def test_noise_that_fits_nowhere_is_written_all_the_same(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    cell = save_sheet(tmp_path / "a.png", lambda side: sheet([[noise] * 9] * 40, None, None, side), [32, 64], 20_000)
    assert cell == 32
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("RGB").getcolors() or []) <= 8


def test_small_images_are_shown_pixel_by_pixel(tmp_path: Path) -> None:
    """Multiples of their own side alone; nothing is lost where it fits."""
    assert cell_sides(64, 128) == [32, 48, 64, 128]
    assert cell_sides(40, 128) == [32, 40, 80, 120] and cell_sides(96, 80) == [32, 48, 64, 80]
    icon = make_image(1, 64).quantize(16).convert("RGB")
    cell = save_sheet(
        tmp_path / "a.png", lambda side: sheet([[icon]], ["one"], None, side), cell_sides(64, 128), 90_000
    )
    assert cell == 128
    with Image.open(tmp_path / "a.png") as image:
        ((found,),) = cut(image.convert("RGB"), 1, 1, 128)
    inner = np.asarray(found)[2:-2:2, 2:-2:2]  # within the outline
    np.testing.assert_array_equal(inner, np.asarray(icon)[1:-1, 1:-1])
