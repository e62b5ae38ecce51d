from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_rows
from tests.helpers.sources import listed, problems, refusal, splits, write_files


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


def test_pictures_in_no_split(here: Path) -> None:
    write_files(here, "train/a.png", "test/b.png", "c.png")
    listing = listed(here, **held("test"))
    assert [(str(problem), problem.file_name) for problem in listing.problems] == [
        ("data/raw/c.png: 'c.png' is in no split, and dataset.heldout_split is 'test'; put it into one", "c.png")
    ]
    assert splits(listing) == {"train/a.png": "train", "test/b.png": "test"}


def test_regularization_pictures_need_no_split(here: Path) -> None:
    write_files(here, "mine/train/a.png", "mine/test/b.png", "class/c.png")
    subsets = [{"path": "mine"}, {"path": "class", "regularization": True}]
    listing = listed(here, subsets=subsets, **held("test"))
    assert splits(listing) == {"mine/test/b.png": "test", "mine/train/a.png": "train", "class/c.png": None}
    assert listing.problems == []


def test_no_such_split(here: Path) -> None:
    write_files(here, "train/a.png", "val/b.png", "train/c.png")
    assert refusal(here, **held("test")) == (
        "params.yaml dataset.heldout_split: no picture is in split 'test'; name one of train, val, or make it by"
        " folders such as train and test, or a column 'split'"
    )
    write_files(here.parent / "flat", "a.png")
    assert "no picture is in split 'test'; make splits by folders" in refusal(here.parent / "flat", **held("test"))
    assert problems(here, **held("train")) == []
