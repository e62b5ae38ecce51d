from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import pytest

from stages.core import seeding
from stages.core.console import UserError
from stages.prepare.inspection import CheckedPicture
from stages.prepare.listing import Entry
from stages.prepare.params import DatasetParams
from stages.prepare.split import Assignment, assign
from tests.images import dataset

Pixels = np.ndarray


def pixels(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(40, 216, (16, 17, 3)).astype(np.uint8)


def row(
    name: str, shown: Pixels, content: str | None = None, subset: int = 0, split: str | None = None
) -> CheckedPicture:
    """A picture; ``content`` stands for its bytes."""
    sha256 = hashlib.sha256((content or name).encode()).hexdigest()
    entry = Entry(name, ("",), f"data/raw/{name}", subset, split)
    return CheckedPicture(entry, sha256, 64, 64, 64, 64, False, base64.b64encode(shown.tobytes()).decode())


def own(sha256: str, params: DatasetParams) -> str:
    draw = seeding.key(params.seed, "split", sha256) / 2**63
    return "heldout" if draw < (params.heldout_fraction or 0) else "train"


def named(**changes: Any) -> DatasetParams:
    return dataset(heldout_fraction=None, heldout_split="test", **changes)


def refusal(rows: list[CheckedPicture], params: DatasetParams) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        assign(rows, params)
    return caught.value.problems


def random_rows(draw: random.Random, number: int) -> list[CheckedPicture]:
    """Of few scenes, so that many are near-duplicates; some have the same bytes."""
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
    found = assign(rows, params)
    assert found.sides == {r.entry.file_name: own(r.sha256, params) for r in rows}
    assert found == Assignment(found.sides, {}, [], [])
    assert 5 <= list(found.sides.values()).count("heldout") <= 30


def test_pictures_are_never_moved_by_others() -> None:
    draw = random.Random(0)
    for trial in range(30):
        params = dataset(heldout_fraction=0.4, seed=trial)
        rows = random_rows(draw, 60)
        fewer = assign(rows[:40], params).sides
        more = assign(rows, params).sides
        assert all(more[name] == side for name, side in fewer.items() if name in more)
        assert all(own(r.sha256, params) == more[r.entry.file_name] for r in rows if r.entry.file_name in more)


def test_near_duplicates_never_straddle_and_nothing_is_lost() -> None:
    draw = random.Random(1)
    num_withheld = 0
    for trial in range(30):
        params = dataset(heldout_fraction=0.4, seed=trial)
        rows = random_rows(draw, 45)
        found = assign(rows, params)
        assert found.sides.keys().isdisjoint(found.withheld)
        assert found.sides.keys() | found.withheld.keys() == {r.entry.file_name for r in rows}
        for names in found.groups:
            assert len({found.sides[name] for name in names if name in found.sides}) == 1
            assert len(names) > 1
        first = {r.entry.file_name: r.sha256 for r in rows}
        for names in found.groups:
            smallest = min(names, key=lambda name: (first[name], name))
            assert smallest in found.sides
        num_withheld += len(found.withheld)
    assert num_withheld > 30


def test_the_result_does_not_depend_on_the_order_of_rows() -> None:
    draw = random.Random(2)
    rows = random_rows(draw, 60)
    expected = assign(rows, dataset(heldout_fraction=0.4))
    draw.shuffle(rows)
    again = assign(rows, dataset(heldout_fraction=0.4))
    assert (again.sides, again.withheld, again.groups) == (expected.sides, expected.withheld, expected.groups)


def straddling(params: DatasetParams) -> tuple[CheckedPicture, CheckedPicture]:
    """Two near-duplicates that drew different sides, the one that decides first."""
    rows = [row(f"{index}.png", pixels(0)) for index in range(40)]
    first = min(rows, key=lambda r: r.sha256)
    other = next(r for r in rows if own(r.sha256, params) != own(first.sha256, params))
    return first, other


def test_a_withheld_picture_says_why() -> None:
    params = dataset(heldout_fraction=0.5)
    first, other = straddling(params)
    rest = [row(f"other-{index}.png", pixels(index)) for index in range(1, 9)]
    found = assign([*rest, other, first], params)
    where = "held out" if own(first.sha256, params) == "heldout" else "trained on"
    name = first.entry.file_name
    assert found.withheld == {other.entry.file_name: f"near-duplicate of '{name}', which is {where}"}
    assert found.groups == [tuple(sorted((name, other.entry.file_name)))]
    unchecked = assign([*rest, other, first], dataset(heldout_fraction=0.5, near_duplicate_bits=None))
    assert (unchecked.withheld, unchecked.groups) == ({}, [])


def test_mirrors_are_near_duplicates_when_training_mirrors() -> None:
    rows = [row(f"{index}.png", pixels(index)) for index in range(8)] + [row("mirror.png", pixels(0)[:, ::-1])]
    assert assign(rows, dataset(heldout_fraction=0.5)).groups == []
    assert assign(rows, dataset(heldout_fraction=0.5, flip=True)).groups == [("0.png", "mirror.png")]


def test_equal_files_are_together_and_warned_of() -> None:
    rows = [row(f"{index}.png", pixels(index)) for index in range(8)]
    twins = [row("twin.png", pixels(3), "3.png"), row("third.png", pixels(3), "3.png")]
    for bits in (None, 16):
        found = assign(rows + twins, dataset(heldout_fraction=0.5, near_duplicate_bits=bits))
        assert len({found.sides[name] for name in ("3.png", "twin.png", "third.png")}) == 1
        assert found.groups == [("3.png", "third.png", "twin.png")]
        assert found.warnings == ["2 pictures have the same bytes as another one and weigh double"]


def with_regularization(**changes: Any) -> dict[str, Any]:
    return {"subsets": [{"path": "mine"}, {"path": "class", "regularization": True}], **changes}


def test_regularization_pictures_are_trained_on() -> None:
    params = dataset(**with_regularization(heldout_fraction=0.5))
    mine = [row(f"mine/{index}.png", pixels(index)) for index in range(8)]
    others = [row(f"class/{index}.png", pixels(100 + index), subset=1) for index in range(20)]
    found = assign(mine + others, params)
    assert {found.sides[r.entry.file_name] for r in others} == {"train"}
    heldout = next(r for r in mine if found.sides[r.entry.file_name] == "heldout")
    copy = row("class/copy.png", pixels(int(heldout.entry.file_name[5])), heldout.entry.file_name, subset=1)
    withheld = assign([*mine, *others, copy], params).withheld
    assert withheld == {"class/copy.png": f"near-duplicate of '{heldout.entry.file_name}', which is held out"}


@pytest.mark.parametrize(("fraction", "split", "advice"), [(0.001, "heldout", "raise"), (0.999, "train", "lower")])
def test_an_empty_side_is_refused(fraction: float, split: str, advice: str) -> None:
    rows = [row(f"{index}.png", pixels(index)) for index in range(8)]
    assert refusal(rows, dataset(heldout_fraction=fraction)) == (
        f"params.yaml dataset.heldout_fraction: {fraction} of 8 pictures leaves the {split} split empty; "
        f"{advice} it, add pictures, or try another dataset.seed",
    )


def test_a_side_that_near_duplicates_empty_is_explained() -> None:
    params = dataset(heldout_fraction=0.5)
    rows = list(straddling(params))
    assert " of 1 pictures (1 withheld as near-duplicates) leaves the " in refusal(rows, params)[0]
    with pytest.raises(UserError, match=r"\(1 withheld as near-duplicates, 3 bad and left out\) leaves the"):
        assign(rows, params, num_left_out=3)


# By name


def test_the_named_split_is_held_out() -> None:
    rows = [row(f"{split}/{index}.png", pixels(index + 9 * (split == "test")), split=split)
            for split in ("train", "test") for index in range(4)]  # fmt: skip
    found = assign(rows, named())
    assert found.sides == {r.entry.file_name: "heldout" if r.entry.split == "test" else "train" for r in rows}
    assert found.warnings == []


def test_near_duplicates_of_the_named_split_are_not_trained_on() -> None:
    close = pixels(1)
    close[0, 0, 0] += 3
    test = [row(f"test/{index}.png", pixels(index), split="test") for index in range(3)]
    train = [row("train/b.png", close, split="train"), row("train/c.png", pixels(7), split="train")]
    found = assign(test + train, named())
    assert found.withheld == {"train/b.png": "near-duplicate of 'test/1.png', which is held out"}
    assert list(found.sides.values()).count("heldout") == 3


def test_one_picture_on_both_sides_is_an_error() -> None:
    rows = [
        row("test/a.png", pixels(1), "a", split="test"),
        row("test/b.png", pixels(2), split="test"),
        row("train/a.png", pixels(1), "a", split="train"),
        row("train/b.webp", pixels(2), split="train"),  # other bytes, the same pixels
        row("train/c.png", pixels(3), split="train"),
    ]
    expected = [
        f"data/raw/train/{bad}: 'train/{bad}' shows the same picture as 'test/{good}', which is held out by "
        "dataset.heldout_split test; remove one of the two"
        for bad, good in (("a.png", "a.png"), ("b.webp", "b.png"))
    ]
    assert sorted(refusal(rows, named())) == expected
    assert refusal(rows, named(near_duplicate_bits=None)) == (expected[0],)


def test_what_becomes_of_the_source_s_splits_is_said() -> None:
    rows = [row(f"{index}.png", pixels(index), split=split)
            for index, split in enumerate(["train", "validation", "test"] * 4)]  # fmt: skip
    assert assign(rows, named()).warnings == [
        "of the source's splits (test, train, validation), all but test are trained on"
    ]
    assert assign(rows, dataset(heldout_fraction=0.5)).warnings == [
        "dataset.heldout_fraction looks past the splits test, train, validation; see heldout_split"
    ]


def test_an_empty_named_split_is_refused() -> None:
    rows = [row(f"{index}.png", pixels(index), split="train") for index in range(4)]
    assert refusal(rows, named()) == (
        "params.yaml dataset.heldout_split: 'test' of 4 pictures leaves the heldout split empty; add pictures to it",
    )
