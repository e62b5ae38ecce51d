from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.errors import assert_are, assert_is
from tests.helpers.sources import listed, problems, refusal, splits, write_files
from tests.helpers.workspace import write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("data/raw")


def held(split: str) -> dict[str, str | None]:
    return {"instance_prompt": "x", "heldout_fraction": None, "heldout_split": split}


def test_folders_with_split_words(here: Path) -> None:
    write_files(here, "train/a.png", "data/val/b.png", "other/c.png", "d.png", "trainings/e.png")
    assert splits(listed(here, instance_prompt="x")) == {
        "data/val/b.png": "val",
        "d.png": None,
        "other/c.png": None,
        "train/a.png": "train",
        "trainings/e.png": None,
    }


@pytest.mark.parametrize(
    ("folder", "heldout"),
    [("val", "validation"), ("dev", "valid"), ("eval", "test"), ("test", "test"), ("mine", "mine")],
)
def test_words_that_datasets_takes_for_one_split(here: Path, folder: str, heldout: str) -> None:
    write_files(here, f"{folder}/a.png", "train/b.png")
    assert splits(listed(here, **held(heldout))) == {f"{folder}/a.png": heldout, "train/b.png": "train"}


def test_other_folders_beside_a_held_out_one(here: Path) -> None:
    write_files(here, "anna/a.png", "ben/b.png")
    assert splits(listed(here, **held("ben"))) == {"anna/a.png": "anna", "ben/b.png": "ben"}
    subsets = [{"path": "anna"}, {"path": "ben"}]
    assert splits(listed(here, subsets=subsets, **held("ben"))) == {"anna/a.png": "anna", "ben/b.png": "ben"}


def test_column_before_folder(here: Path) -> None:
    write_files(here, "train/a.png", "train/b.png")
    rows = [{"file_name": "train/a.png", "text": "x", "split": "test"}, {"file_name": "train/b.png", "text": "x"}]
    write_rows(here, rows)
    assert splits(listed(here)) == {"train/a.png": "test", "train/b.png": "train"}


def test_images_in_no_split(here: Path) -> None:
    write_files(here, "train/a.png", "test/b.png", "c.png")
    listing = listed(here, **held("test"))
    assert_are(listing.problems, ("image-without-split", "data/raw/c.png: 'c.png'", "'test'"))
    assert listing.problems[0].file_name == "c.png"
    assert splits(listing) == {"train/a.png": "train", "test/b.png": "test"}


def test_regularization_images_need_no_split(here: Path) -> None:
    write_files(here, "mine/train/a.png", "mine/test/b.png", "class/c.png")
    subsets = [{"path": "mine"}, {"path": "class", "regularization": True}]
    listing = listed(here, subsets=subsets, **held("test"))
    assert splits(listing) == {"mine/test/b.png": "test", "mine/train/a.png": "train", "class/c.png": None}
    assert listing.problems == []


def test_missing_heldout_split(here: Path) -> None:
    write_files(here, "train/a.png", "val/b.png", "train/c.png")
    problem = refusal(here, **held("test"))
    assert_is(problem, "split-missing", "params.yaml dataset.heldout_split: ", "'test'", "train, val")
    write_files(here.parent / "flat", "a.png")
    assert_is(refusal(here.parent / "flat", **held("test")), "split-missing", "Make splits")
    assert problems(here, **held("train")) == []
