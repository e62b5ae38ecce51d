from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import pytest

from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError
from stages.prepare.checked_image import CheckedImage
from stages.prepare.listing import Entry
from stages.prepare.params import DatasetParams
from stages.prepare.split import Assignment, assign_splits
from tests.helpers.errors import assert_are, refused
from tests.helpers.images import dataset

Pixels = np.ndarray


def pixels(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(40, 216, (16, 17, 3)).astype(np.uint8)


def row(
    name: str, shown: Pixels, content: str | None = None, subset: int = 0, split: str | None = None
) -> CheckedImage:
    """Return an image; its digest is that of ``content``."""
    sha256 = hashlib.sha256((content or name).encode()).hexdigest()
    entry = Entry(name, ("",), f"data/raw/{name}", subset, split)
    return CheckedImage(entry, sha256, 64, 64, 64, 64, False, base64.b64encode(shown.tobytes()).decode())


def own(sha256: str, params: DatasetParams) -> str:
    draw = seeding.key(params.seed, "split", sha256) / 2**63
    return "heldout" if draw < (params.heldout_fraction or 0) else "train"


def named(**changes: Any) -> DatasetParams:
    return dataset(heldout_fraction=None, heldout_split="test", **changes)


def refusal(rows: list[CheckedImage], params: DatasetParams) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        assign_splits(rows, params)
    return caught.value.problems


def random_rows(draw: random.Random, number: int) -> list[CheckedImage]:
    """Return rows of a few scenes: many are near-duplicates, and some have the same bytes."""
    rows = []
    for index in range(number):
        scene, grain = draw.randrange(number // 3), draw.randrange(4)
        shown = pixels(scene)
        shown[0, 0, 0] += grain
        rows.append(row(f"{index:03}.png", shown, f"{scene}-{grain}-{draw.randrange(2)}"))
    return rows


# By fraction


def test_the_draw_is_by_content_as_it_always_was() -> None:
    params = dataset(heldout_fraction=0.3, seed=4)
    rows = [row(f"{index}.png", pixels(index)) for index in range(60)]
    found = assign_splits(rows, params)
    assert found.split_of == {r.entry.file_name: own(r.sha256, params) for r in rows}
    assert found == Assignment(found.split_of, {}, [], [])
    assert 5 <= list(found.split_of.values()).count("heldout") <= 30


def test_images_are_never_moved_by_others() -> None:
    draw = random.Random(0)
    for trial in range(30):
        params = dataset(heldout_fraction=0.4, seed=trial)
        rows = random_rows(draw, 60)
        fewer = assign_splits(rows[:40], params).split_of
        more = assign_splits(rows, params).split_of
        assert all(more[name] == side for name, side in fewer.items() if name in more)
        assert all(own(r.sha256, params) == more[r.entry.file_name] for r in rows if r.entry.file_name in more)


def test_near_duplicates_never_straddle_and_nothing_is_lost() -> None:
    draw = random.Random(1)
    num_withheld = 0
    for trial in range(30):
        params = dataset(heldout_fraction=0.4, seed=trial)
        rows = random_rows(draw, 45)
        found = assign_splits(rows, params)
        assert found.split_of.keys().isdisjoint(found.excluded)
        assert found.split_of.keys() | found.excluded.keys() == {r.entry.file_name for r in rows}
        for names in found.groups:
            assert len({found.split_of[name] for name in names if name in found.split_of}) == 1
            assert len(names) > 1
        first = {r.entry.file_name: r.sha256 for r in rows}
        for names in found.groups:
            smallest = min(names, key=lambda name: (first[name], name))
            assert smallest in found.split_of
        num_withheld += len(found.excluded)
    assert num_withheld > 30


def test_the_result_does_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(2)
    rows = random_rows(draw, 60)
    expected = assign_splits(rows, dataset(heldout_fraction=0.4))
    draw.shuffle(rows)
    again = assign_splits(rows, dataset(heldout_fraction=0.4))
    assert (again.split_of, again.excluded, again.groups) == (expected.split_of, expected.excluded, expected.groups)


def straddling(params: DatasetParams) -> tuple[CheckedImage, CheckedImage]:
    """Two near-duplicates that drew different sides, the one that decides first."""
    rows = [row(f"{index}.png", pixels(0)) for index in range(40)]
    first = min(rows, key=lambda r: r.sha256)
    other = next(r for r in rows if own(r.sha256, params) != own(first.sha256, params))
    return first, other


def test_an_excluded_image_has_a_reason() -> None:
    params = dataset(heldout_fraction=0.5)
    first, other = straddling(params)
    rest = [row(f"other-{index}.png", pixels(index)) for index in range(1, 9)]
    found = assign_splits([*rest, other, first], params)
    where = "held out" if own(first.sha256, params) == "heldout" else "trained on"
    name = first.entry.file_name
    assert found.excluded == {other.entry.file_name: f"near-duplicate of '{name}', which is {where}"}
    assert found.groups == [tuple(sorted((name, other.entry.file_name)))]
    unchecked = assign_splits([*rest, other, first], dataset(heldout_fraction=0.5, near_duplicate_bits=None))
    assert (unchecked.excluded, unchecked.groups) == ({}, [])


def test_mirrors_are_near_duplicates_when_training_mirrors() -> None:
    rows = [row(f"{index}.png", pixels(index)) for index in range(8)] + [row("mirror.png", pixels(0)[:, ::-1])]
    assert assign_splits(rows, dataset(heldout_fraction=0.5)).groups == []
    assert assign_splits(rows, dataset(heldout_fraction=0.5, flip=True)).groups == [("0.png", "mirror.png")]


def test_equal_files_share_a_split_and_are_warned_about() -> None:
    rows = [row(f"{index}.png", pixels(index)) for index in range(8)]
    twins = [row("twin.png", pixels(3), "3.png"), row("third.png", pixels(3), "3.png")]
    for bits in (None, 16):
        found = assign_splits(rows + twins, dataset(heldout_fraction=0.5, near_duplicate_bits=bits))
        assert len({found.split_of[name] for name in ("3.png", "twin.png", "third.png")}) == 1
        assert found.groups == [("3.png", "third.png", "twin.png")]
        assert_are(found.warnings, ("image-copies", "2 images"))


def with_regularization(**changes: Any) -> dict[str, Any]:
    return {"subsets": [{"path": "mine"}, {"path": "class", "regularization": True}], **changes}


def test_regularization_images_are_trained_on() -> None:
    params = dataset(**with_regularization(heldout_fraction=0.5))
    mine = [row(f"mine/{index}.png", pixels(index)) for index in range(8)]
    others = [row(f"class/{index}.png", pixels(100 + index), subset=1) for index in range(20)]
    found = assign_splits(mine + others, params)
    assert {found.split_of[r.entry.file_name] for r in others} == {"train"}
    heldout = next(r for r in mine if found.split_of[r.entry.file_name] == "heldout")
    copy = row("class/copy.png", pixels(int(heldout.entry.file_name[5])), heldout.entry.file_name, subset=1)
    excluded = assign_splits([*mine, *others, copy], params).excluded
    assert excluded == {"class/copy.png": f"near-duplicate of '{heldout.entry.file_name}', which is held out"}


def few(number: int, params: DatasetParams, least: int = 0) -> list[CheckedImage]:
    """Images of which only ``least`` are drawn to be held out."""
    rows = [row(f"{index}.png", pixels(index)) for index in range(200)]
    drawn = [r for r in rows if own(r.sha256, params) == "heldout"]
    others = [r for r in rows if own(r.sha256, params) == "train"]
    return [*drawn[:least], *others[: number - least]]


def drawn(r: CheckedImage, params: DatasetParams) -> float:
    return seeding.key(params.seed, "split", r.sha256) / 2**63


@pytest.mark.parametrize("number", [2, 3, 4, 5, 10, 13, 20])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_small_sets_have_both_sides_under_any_fraction(number: int, fraction: float) -> None:
    for seed in range(8):
        params = dataset(heldout_fraction=fraction, seed=seed)
        sides = list(
            assign_splits([row(f"{index}.png", pixels(index)) for index in range(number)], params).split_of.values()
        )
        least = min(2, number // 2)
        assert sides.count("heldout") >= least and sides.count("train") >= least
        assert len(sides) == number


@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_nearest_draws_fill_a_small_heldout_split(least: int) -> None:
    params = dataset()
    rows = few(13, params, least)
    found = assign_splits(rows, params)
    expected = sorted(rows, key=lambda r: drawn(r, params))[:2]
    assert {name for name, side in found.split_of.items() if side == "heldout"} == {r.entry.file_name for r in expected}
    names = ", ".join(r.entry.file_name for r in expected[least:])
    verb = {0: "are", 1: "is"}.get(least)
    notes = [note for note in found.notes if "nearest" in note]
    assert len(notes) == bool(names)
    for note in notes:
        assert f"heldout_fraction 0.1 drew {least} of 13 images" in note and f"{names} with" in note
        assert f" {verb} held out" in note


def test_only_images_beyond_the_draw_can_go_back_to_training() -> None:
    params = dataset()
    rows = few(13, params, least=1)
    before = assign_splits(rows, params).split_of
    more = assign_splits([*rows, *few(60, params, least=6)[1:]], params).split_of
    changed = {name for name, side in before.items() if more[name] != side}
    assert len(changed) == 1
    assert {before[name] for name in changed} == {"heldout"}
    assert all(own(r.sha256, params) == "train" for r in rows if r.entry.file_name in changed)


def test_near_duplicates_are_moved_together() -> None:
    params = dataset()
    rows = few(6, params)
    close = pixels(int(min(rows, key=lambda r: drawn(r, params)).entry.file_name[:-4]))
    close[0, 0, 0] += 3
    twin = next(r for r in (row(f"twin-{i}.png", close) for i in range(99)) if own(r.sha256, params) == "train")
    found = assign_splits([*rows, twin], params)
    (names,) = found.groups
    assert len({found.split_of[name] for name in names}) == 1
    assert list(found.split_of.values()).count("train") >= 2 and not found.excluded


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_one_image_cannot_be_split(fraction: float) -> None:
    expected = ("split-impossible", "data/raw: 1 image cannot")
    assert_are(refusal([row("a.png", pixels(0))], dataset(heldout_fraction=fraction)), expected)
    params = dataset(**with_regularization(heldout_fraction=fraction))
    others = [row(f"class/{index}.png", pixels(100 + index), subset=1) for index in range(3)]
    assert_are(refusal([row("mine/a.png", pixels(0)), *others], params), expected)
    assert_are(refusal(others, params), ("split-impossible", "data/raw: ", "regularization"))
    with refused("split-impossible", "1 image (3 bad and left out)"):
        assign_splits([row("a.png", pixels(0))], dataset(), num_left_out=3)


def test_near_duplicates_alone_cannot_be_split() -> None:
    rows = list(straddling(dataset(heldout_fraction=0.5)))
    problem = (
        "split-impossible",
        "data/raw: all 2 images (1 excluded as near-duplicates)",
        "near_duplicate_bits from 16 to null",
    )
    assert_are(refusal(rows, dataset(heldout_fraction=0.5)), problem)
    found = assign_splits(rows, dataset(heldout_fraction=0.5, near_duplicate_bits=None))
    assert set(found.split_of.values()) == {"heldout", "train"}
    same = [row(f"{index}.png", pixels(0), "a") for index in range(3)]
    assert_are(refusal(same, dataset()), ("split-impossible", "data/raw: all 3 images", "same bytes"))


def test_a_large_near_duplicate_group_is_warned_about() -> None:
    params = dataset(heldout_fraction=0.5)
    alike = [row(f"{index}.png", pixels(0)) for index in range(6)]
    others = [row(f"other-{index}.png", pixels(1 + index)) for index in range(5)]
    found = assign_splits([*alike, *others], params)
    lost = len(found.excluded)
    assert lost > 1
    names, fix = "(0.png, 1.png, 2.png, ...)", "dataset.near_duplicate_bits from 16 to null"
    assert_are(found.warnings, ("near-duplicates-many", "6 of 11 images", f"{lost} of which are", names, fix))
    assert assign_splits([*alike, *others, row("x.png", pixels(50))], params).warnings == []


@pytest.mark.parametrize("number", [12, 20, 40])
def test_the_suggested_fraction_holds_out_enough(number: int) -> None:
    rows = few(number, dataset(), least=2)
    (note,) = assign_splits(rows, dataset()).notes
    assert f"2 images are held out of {number}" in note and "to hold out 5." in note
    fraction = float(note.rpartition("dataset.heldout_fraction=")[2].split()[0])
    sides = list(assign_splits(rows, dataset(heldout_fraction=fraction)).split_of.values())
    assert sides.count("heldout") >= 5 <= sides.count("train")
    fewer = list(assign_splits(rows, dataset(heldout_fraction=fraction - 0.01)).split_of.values())
    assert fewer.count("heldout") < 5
    (note,) = assign_splits(rows[:8], dataset()).notes
    assert "heldout_fraction" not in note


# By name


def test_the_named_split_is_held_out() -> None:
    rows = [row(f"{split}/{index}.png", pixels(index + 9 * (split == "test")), split=split)
            for split in ("train", "test") for index in range(4)]  # fmt: skip
    found = assign_splits(rows, named())
    assert found.split_of == {r.entry.file_name: "heldout" if r.entry.split == "test" else "train" for r in rows}
    assert found.warnings == []


def test_near_duplicates_of_the_named_split_are_not_trained_on() -> None:
    close = pixels(1)
    close[0, 0, 0] += 3
    test = [row(f"test/{index}.png", pixels(index), split="test") for index in range(3)]
    train = [row("train/b.png", close, split="train"), row("train/c.png", pixels(7), split="train")]
    found = assign_splits(test + train, named())
    assert found.excluded == {"train/b.png": "near-duplicate of 'test/1.png', which is held out"}
    assert list(found.split_of.values()).count("heldout") == 3


def test_one_image_on_both_sides_is_an_error() -> None:
    rows = [
        row("test/a.png", pixels(1), "a", split="test"),
        row("test/b.png", pixels(2), split="test"),
        row("train/a.png", pixels(1), "a", split="train"),
        row("train/b.webp", pixels(2), split="train"),  # other bytes, the same pixels
        row("train/c.png", pixels(3), split="train"),
    ]
    expected = [
        ("split-leak", f"data/raw/train/{bad}: 'train/{bad}'", f"'test/{good}'", "dataset.heldout_split test")
        for bad, good in (("a.png", "a.png"), ("b.webp", "b.png"))
    ]
    assert_are(sorted(refusal(rows, named())), *expected)
    assert_are(refusal(rows, named(near_duplicate_bits=None)), expected[0])


def test_ignored_splits_are_warned_about() -> None:
    rows = [row(f"{index}.png", pixels(index), split=split)
            for index, split in enumerate(["train", "validation", "test"] * 4)]  # fmt: skip
    splits = "(test, train, validation)"
    assert_are(assign_splits(rows, named()).warnings, ("split-ignored", splits, "except test"))
    assert_are(
        assign_splits(rows, dataset(heldout_fraction=0.5)).warnings,
        ("split-ignored", "params.yaml dataset.heldout_fraction: ", splits, "dataset.heldout_split"),
    )


def test_an_empty_named_split_is_refused() -> None:
    rows = [row(f"{index}.png", pixels(index), split="train") for index in range(4)]
    place = "params.yaml dataset.heldout_split: 'test' of 4 images"
    assert_are(refusal(rows, named()), ("split-empty", place, "heldout split"))
    rows = [row(f"{index}.png", pixels(index), split="test") for index in range(4)]
    assert_are(refusal(rows, named()), ("split-empty", place, "train split", "such as train."))
    close = pixels(0)
    close[0, 0, 0] += 3
    excluded = row("close.png", close, split="train")
    problem = ("split-empty", f"{place} (1 excluded as near-duplicates)", "dataset.near_duplicate_bits to null")
    assert_are(refusal([*rows, excluded], named()), problem)
    assert assign_splits([*rows, excluded], named(near_duplicate_bits=None)).split_of["close.png"] == "train"
