from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import pytest

from lora_dag.core import seeding
from lora_dag.core.console import UserError
from stages.prepare.checked_picture import CheckedPicture
from stages.prepare.listing import Entry
from stages.prepare.params import DatasetParams
from stages.prepare.split import Assignment, assign
from tests.helpers.images import dataset

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
        assert found.warnings == ["2 pictures have the same bytes as another one, so that it weighs double"]


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


def few(number: int, params: DatasetParams, least: int = 0) -> list[CheckedPicture]:
    """Pictures of which only ``least`` are drawn to be held out."""
    rows = [row(f"{index}.png", pixels(index)) for index in range(200)]
    drawn = [r for r in rows if own(r.sha256, params) == "heldout"]
    others = [r for r in rows if own(r.sha256, params) == "train"]
    return [*drawn[:least], *others[: number - least]]


def drawn(r: CheckedPicture, params: DatasetParams) -> float:
    return seeding.key(params.seed, "split", r.sha256) / 2**63


@pytest.mark.parametrize("number", [2, 3, 4, 5, 10, 13, 20])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_small_sets_have_both_sides_under_any_fraction(number: int, fraction: float) -> None:
    for seed in range(8):
        params = dataset(heldout_fraction=fraction, seed=seed)
        sides = list(assign([row(f"{index}.png", pixels(index)) for index in range(number)], params).sides.values())
        least = min(2, number // 2)
        assert sides.count("heldout") >= least and sides.count("train") >= least
        assert len(sides) == number


@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_nearest_draws_are_held_out_where_fewer_than_two_are_drawn(least: int) -> None:
    params = dataset()
    rows = few(13, params, least)
    found = assign(rows, params)
    expected = sorted(rows, key=lambda r: drawn(r, params))[:2]
    assert {name for name, side in found.sides.items() if side == "heldout"} == {r.entry.file_name for r in expected}
    names = ", ".join(r.entry.file_name for r in expected[least:])
    verb = {0: "are", 1: "is"}.get(least)
    said = f"dataset.heldout_fraction 0.1 drew {least} of 13 pictures to be held out; {names} came nearest and {verb}"
    assert [note for note in found.notes if "came nearest" in note] == (
        [f"{said} held out as well, until more pictures are added"] if names else []
    )


def test_only_pictures_beyond_the_draw_can_go_back_to_training() -> None:
    params = dataset()
    rows = few(13, params, least=1)
    before = assign(rows, params).sides
    more = assign([*rows, *few(60, params, least=6)[1:]], params).sides
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
    found = assign([*rows, twin], params)
    (names,) = found.groups
    assert len({found.sides[name] for name in names}) == 1
    assert list(found.sides.values()).count("train") >= 2 and not found.withheld


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_one_picture_cannot_be_split(fraction: float) -> None:
    said = "data/raw: 1 picture cannot be split; at least two are needed, since one is held out"
    assert refusal([row("a.png", pixels(0))], dataset(heldout_fraction=fraction)) == (said,)
    params = dataset(**with_regularization(heldout_fraction=fraction))
    others = [row(f"class/{index}.png", pixels(100 + index), subset=1) for index in range(3)]
    assert refusal([row("mine/a.png", pixels(0)), *others], params) == (said,)
    assert "every picture is for regularization, and none of those is held out; add" in refusal(others, params)[0]
    with pytest.raises(UserError, match=r"since one is held out \(3 bad and left out\)$"):
        assign([row("a.png", pixels(0))], dataset(), num_left_out=3)


def test_the_cure_of_a_set_of_near_duplicates_works() -> None:
    rows = list(straddling(dataset(heldout_fraction=0.5)))
    assert refusal(rows, dataset(heldout_fraction=0.5)) == (
        "data/raw: all 2 pictures are near-duplicates of each other (dataset.near_duplicate_bits: 16) and stay on one "
        "side of the split; add other pictures, or set dataset.near_duplicate_bits to null if these are different "
        "(1 withheld as near-duplicates)",
    )
    found = assign(rows, dataset(heldout_fraction=0.5, near_duplicate_bits=None))
    assert set(found.sides.values()) == {"heldout", "train"}
    same = [row(f"{index}.png", pixels(0), "a") for index in range(3)]
    assert refusal(same, dataset()) == (
        "data/raw: all 3 pictures have the same bytes and cannot be split; add other pictures",
    )


def test_most_of_the_pictures_in_one_group_is_warned_of() -> None:
    params = dataset(heldout_fraction=0.5)
    alike = [row(f"{index}.png", pixels(0)) for index in range(6)]
    others = [row(f"other-{index}.png", pixels(1 + index)) for index in range(5)]
    found = assign([*alike, *others], params)
    lost = len(found.withheld)
    assert lost > 1
    assert found.warnings == [
        f"6 of 11 pictures are near-duplicates of each other, {lost} of which are left out (0.png, 1.png, 2.png, ...); "
        "if they are different, set dataset.near_duplicate_bits 16 to null"
    ]
    assert assign([*alike, *others, row("x.png", pixels(50))], params).warnings == []


@pytest.mark.parametrize("number", [12, 20, 40])
def test_the_fraction_that_is_named_holds_out_enough(number: int) -> None:
    rows = few(number, dataset(), least=2)
    (note,) = assign(rows, dataset()).notes
    said = f"2 pictures are held out of {number}, and fewer than 5 seldom tell settings apart; "
    assert note.startswith(f"{said}dataset.heldout_fraction=0.") and note.endswith(" holds out 5 of these")
    fraction = float(note.rpartition("=")[2].split()[0])
    sides = list(assign(rows, dataset(heldout_fraction=fraction)).sides.values())
    assert sides.count("heldout") >= 5 <= sides.count("train")
    fewer = list(assign(rows, dataset(heldout_fraction=fraction - 0.01)).sides.values())
    assert fewer.count("heldout") < 5
    (note,) = assign(rows[:8], dataset()).notes
    assert note.endswith("add pictures")


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
    rows = [row(f"{index}.png", pixels(index), split="test") for index in range(4)]
    assert refusal(rows, named()) == (
        "params.yaml dataset.heldout_split: 'test' of 4 pictures leaves the train split empty; add pictures to another "
        "split, such as train",
    )
    close = pixels(0)
    close[0, 0, 0] += 3
    withheld = row("close.png", close, split="train")
    assert refusal([*rows, withheld], named()) == (
        "params.yaml dataset.heldout_split: 'test' of 4 pictures (1 withheld as near-duplicates) leaves the train split"
        " empty; add pictures to another split, such as train, or set dataset.near_duplicate_bits to null if these are"
        " different",
    )
    assert assign([*rows, withheld], named(near_duplicate_bits=None)).sides["close.png"] == "train"
