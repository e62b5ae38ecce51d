"""The dataset's numbers, table and contact sheet: functions of the manifest, right at the edges."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.artifacts import image_table
from lora_dag.artifacts.manifest import Augmentation, Item
from lora_dag.pages import sheets
from stages.prepare import dataset_report
from tests.helpers.manifests import item_of, manifest_of, reader
from tests.helpers.workspace import Images, make_image


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))


@pytest.fixture
def raw(tmp_path: Path, images: Images) -> Path:
    """00.png to 07.png."""
    return images(tmp_path / "raw")


def items_of(raw: Path, heldout: tuple[int, ...] = (6, 7), **changes: Any) -> list[Item]:
    return [
        item_of(raw, f"{index:02}.png", split="heldout" if index in heldout else "train", **changes)
        for index in range(8)
    ]


def write(raw: Path, items: list[Item], out: Path, **changes: Any) -> dict[str, Any]:
    """metrics.json of what ``dataset_report.write_report`` wrote into ``out``."""
    values: dict[str, Any] = {"left_out": [], "groups": [], "num_unlisted": 0, "read": reader(raw)} | changes
    dataset_report.write_report(manifest_of(raw, items), folder=out, **values)
    return json.loads((out / "metrics.json").read_text())


def test_numbers(raw: Path, tmp_path: Path) -> None:
    items = items_of(raw)
    items[0] = item_of(raw, "00.png", width=48, height=24, captions=("a", "b", "c"), caption="a")
    items[1] = item_of(raw, "01.png", regularization=True, mask="alpha")
    left_out = [("bad.png", "rows:3: 'bad.png' is damaged"), ("twin.png", "near-duplicate of '02.png'")]
    groups = [("02.png", "twin.png")]
    found = write(raw, items, tmp_path / "out", left_out=left_out, groups=groups, num_unlisted=5)
    assert 0 < found.pop("chroma") < 255 and 0 <= found.pop("dark_share") <= 1
    assert found == {
        "num_images": 8,
        "num_train": 6,
        "num_heldout": 2,
        "num_left_out": 2,
        "num_unlisted": 5,
        "num_near_duplicate_groups": 1,
        "num_buckets": 2,
        "num_masked": 1,
        "num_captions": 3 + 7,
        "num_regularization": 1,
        "caption_words_median": 4,
        "caption_words_max": 4,
        "bucket.32x32": 7,
        "bucket.48x24": 1,
    }


def test_one_size_is_not_counted_by_size_and_many_are_capped(raw: Path, tmp_path: Path) -> None:
    found = write(raw, items_of(raw), tmp_path / "out")
    assert not [name for name in found if name.startswith("bucket.")] and "num_regularization" not in found
    items = fake_items([(side, 32) for side in range(8, 8 + 50)])
    counted = dataset_report.count(items, [], [], 0)
    assert len([name for name in counted if name.startswith("bucket.")]) == 40
    assert counted["num_buckets"] == 50


def test_pixel_measures_hold_one_image_at_a_time(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    measured, alive = dataset_report.chroma, []

    def chroma(array: Any) -> float:
        seen.append(weakref.ref(array))
        alive.append(sum(held() is not None for held in seen))
        return measured(array)

    monkeypatch.setattr(dataset_report, "chroma", chroma)
    write(raw, items_of(raw), tmp_path / "out")
    assert len(alive) == 6 and max(alive) <= 2


def test_pixel_measures_are_of_a_sample_that_file_names_do_not_decide(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_report, "NUM_MEASURED", 3)
    items = items_of(raw, heldout=())
    renamed = [Item(**{**vars(item), "file_name": f"{9 - i}.png"}) for i, item in enumerate(items)]
    names = {new.file_name: old.file_name for old, new in zip(items, renamed, strict=True)}
    read: list[str] = []

    def counted(name: str) -> bytes:
        read.append(name)
        return reader(raw)(names.get(name, name))

    first = dataset_report.measure(manifest_of(raw, items), reader(raw))
    assert dataset_report.measure(manifest_of(raw, renamed), counted) == first
    assert read == []  # they are remembered by content
    shutil.rmtree(raw.parent / ".state")
    assert dataset_report.measure(manifest_of(raw, renamed), counted) == first
    assert len(read) == 3


def test_color_measures_are_cached_by_view_and_preprocessing(raw: Path) -> None:
    manifest = manifest_of(raw, items_of(raw))
    read: list[str] = []

    def counted(name: str) -> bytes:
        read.append(name)
        return reader(raw)(name)

    first = dataset_report.measure(manifest, counted)
    assert dataset_report.measure(manifest, counted) == first and len(read) == 6
    dataset_report.measure(manifest_of(raw, items_of(raw, width=24)), counted)
    assert len(read) == 12
    dataset_report.measure(replace(manifest, preprocessing=manifest.preprocessing | {"filter": "bilinear"}), counted)
    assert len(read) == 18
    dataset_report.measure(replace(manifest, augmentation=Augmentation("random", flip=False, seed=0)), counted)
    assert len(read) == 18  # square images have one crop


def test_pixel_measures_leave_regularization_out(raw: Path) -> None:
    items = items_of(raw)
    style = dataset_report.measure(manifest_of(raw, items[:1]), reader(raw))
    others = [Item(**{**vars(item), "regularization": True}) for item in items[1:]]
    assert dataset_report.measure(manifest_of(raw, [items[0], *others]), reader(raw)) == style
    assert dataset_report.measure(manifest_of(raw, others[-2:]), reader(raw)) == {"chroma": None, "dark_share": None}


def test_table(raw: Path, tmp_path: Path) -> None:
    items = items_of(raw, caption='a "quoted", caption\nof two lines')
    items[2] = item_of(raw, "02.png", captions=("a", "b"), caption="a", repeats=3, width=40, height=24)
    left_out = [("00-bad.png", "rows:3: 'bad.png' is damaged"), ("twin.png", "near-duplicate of '03.png'")]
    write(raw, items[::-1], tmp_path / "out", left_out=left_out, groups=[("twin.png", "03.png")])
    path = tmp_path / "out" / "images.csv"
    blob = path.read_bytes()
    assert b"\r" not in blob
    rows = list(csv.DictReader(blob.decode("utf-8").splitlines(keepends=True)))
    assert [row["file_name"] for row in rows] == sorted([*(i.file_name for i in items), "00-bad.png", "twin.png"])
    by_name = {row["file_name"]: row for row in rows}
    assert by_name["02.png"] | {"sha256": "", "captions_digest": ""} == {
        "file_name": "02.png",
        "split": "train",
        "width": "48",
        "height": "48",
        "bucket": "40x24",
        "repeats": "3",
        "captions": "a",
        "num_captions": "2",
        "captions_digest": "",
        "sha256": "",
        "near_duplicates": "",
        "reason": "",
    }
    assert len(by_name["02.png"]["captions_digest"]) == 12 and by_name["01.png"]["captions_digest"] == ""
    assert by_name["00.png"]["captions"] == 'a "quoted", caption\nof two lines'
    assert by_name["07.png"]["split"] == "heldout"
    bad, twin = by_name["00-bad.png"], by_name["twin.png"]
    assert (bad["split"], bad["width"], bad["reason"]) == ("left out", "", "rows:3: 'bad.png' is damaged")
    assert twin["near_duplicates"] == by_name["03.png"]["near_duplicates"] == "03.png"
    assert image_table.load(path) == rows


def test_equal_files_are_not_counted_as_near_duplicates(raw: Path, tmp_path: Path) -> None:
    (raw / "copy.png").write_bytes((raw / "00.png").read_bytes())
    items = [*items_of(raw), item_of(raw, "copy.png")]
    groups = [("00.png", "copy.png"), ("01.png", "excluded.png")]
    found = write(raw, items, tmp_path / "out", groups=groups, left_out=[("excluded.png", "near-duplicate")])
    rows = {row["file_name"]: row["near_duplicates"] for row in image_table.load(tmp_path / "out" / "images.csv")}
    assert found["num_near_duplicate_groups"] == 1
    assert {name: first for name, first in rows.items() if first} == {"01.png": "01.png", "excluded.png": "01.png"}


def test_table_reads_long_captions_and_refuses_other_files() -> None:
    row = {"file_name": "a.png", "split": "train", "captions": "x" * 200_000}
    text = f"file_name,split,captions\na.png,train,{row['captions']}\n"
    (found,) = image_table.parse(text)
    assert found["captions"] == row["captions"] and found["reason"] == ""
    with pytest.raises(ValueError, match="no columns file_name and split"):
        image_table.parse("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="no CSV"):
        image_table.parse('file_name,split\n"a.png"x,train\n')


def test_bytes_do_not_depend_on_the_order(raw: Path, tmp_path: Path) -> None:
    items = items_of(raw)
    write(raw, items, tmp_path / "a")
    write(raw, items[::-1], tmp_path / "b")
    for name in ("metrics.json", "images.csv", "contact.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rows_of_one_size() -> None:
    rows = dataset_report.sample_rows(fake_items([(32, 32)] * 60, heldout=20))
    assert [label for label, _ in rows] == ["train"] * 4 + ["held-out"]
    assert all(len(items) == 8 for _, items in rows)


def test_rows_are_shared_among_sizes_by_their_number_of_images() -> None:
    sizes = [(32, 32)] * 40 + [(48, 24)] * 22 + [(24, 48)] * 3
    rows = dataset_report.sample_rows(fake_items(sizes, heldout=1))
    assert [label for label, _ in rows] == [
        "train 48x24",
        "train 32x32",
        "train 32x32",
        "train 24x48",
        "held-out",
    ]
    assert [len(items) for _, items in rows] == [8, 8, 8, 3, 1]


def test_only_the_most_frequent_sizes_have_rows() -> None:
    sizes = [(side, 32) for side in range(8, 80, 8) for _ in range(side)]
    rows = dataset_report.sample_rows(fake_items(sizes))
    assert [label for label, _ in rows] == [f"train {side}x32" for side in (72, 64, 56, 48)]


def test_regularization_has_a_row_of_its_own() -> None:
    items = fake_items([(32, 32)] * 3) + fake_items([(32, 32)] * 9, regularization=True)
    assert [(label, len(row)) for label, row in dataset_report.sample_rows(items)] == [
        ("train", 3),
        ("regularization", 8),
    ]


def fake_items(sizes: list[tuple[int, int]], heldout: int = 0, **changes: Any) -> list[Item]:
    """Items without images; ``heldout`` more are held out."""
    splits = ["train"] * len(sizes) + ["heldout"] * heldout
    return [
        Item(f"{i:03}.png", f"{i * 7919 % 1000:064x}", "a", ("a",), split, 99, 99, width, height, **changes)  # type: ignore[arg-type]
        for i, (split, (width, height)) in enumerate(zip(splits, sizes + sizes[:1] * heldout, strict=True))
    ]


def test_contact_sheet_is_small_and_nothing_but_pixels(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        noise = rng.integers(0, 256, (80, 80, 3), np.uint8)
        Image.fromarray(noise).save(raw / f"{index:02}.png")
    items = [
        item_of(raw, path.name, width=80, height=80, caption="x" * 3000, split="heldout" if i < 9 else "train")
        for i, path in enumerate(sorted(raw.glob("*.png")))
    ]
    write(raw, items, tmp_path / "out")
    path = tmp_path / "out" / "contact.png"
    assert path.stat().st_size <= sheets.MAX_BYTES["contact"]
    with Image.open(path) as contact:
        assert contact.info == {} and contact.width > 300


def test_cell_shows_the_crop_with_bars_of_another_color(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 32), "#00ff00")
    image.paste("#ff0000", (24, 0, 72, 32))
    image.save(tmp_path / "wide.png")
    item = item_of(tmp_path, "wide.png", width=48, height=32)
    cell = dataset_report.cell(manifest_of(tmp_path, [item]), item, reader(tmp_path))
    assert cell.size == (48, 48)
    assert cell.getpixel((24, 2)) == cell.getpixel((24, 46)) == (0xEA, 0xEE, 0xF2)
    assert cell.getpixel((2, 24)) == cell.getpixel((45, 24)) == (255, 0, 0)


@pytest.mark.parametrize("mask", ["alpha", "masks/half.png"])
def test_cell_is_gray_where_masked(tmp_path: Path, mask: str) -> None:
    image = Image.new("RGBA", (32, 32), "#ff0000ff")
    if mask == "alpha":
        image.paste("#ff000000", (0, 0, 16, 32))
    image.save(tmp_path / "half.png")
    (tmp_path / "masks").mkdir()
    half = Image.new("L", (32, 32), 255)
    half.paste(0, (0, 0, 16, 32))
    half.save(tmp_path / "masks" / "half.png")
    item = item_of(tmp_path, "half.png", mask=mask)
    cell = dataset_report.cell(manifest_of(tmp_path, [item]), item, reader(tmp_path))
    assert cell.getpixel((24, 16)) == (255, 0, 0)
    hidden = cell.getpixel((4, 16))
    assert isinstance(hidden, tuple) and max(hidden) - min(hidden) < 70 and 90 < hidden[0] < 200


def test_few_images_leave_room_for_the_title(tmp_path: Path) -> None:
    make_image(1).save(tmp_path / "a.png")
    items = [item_of(tmp_path, "a.png")]
    assert dataset_report.contact_sheet(manifest_of(tmp_path, items), reader(tmp_path))(80).width > 400
