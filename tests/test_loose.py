"""Folders of pictures with .txt files beside them, or one prompt for all; what is left out is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import write_rows
from tests.sources import captions, listed, others, problems, refusal, write_files


def test_text_files_beside_pictures(here: Path) -> None:
    write_files(here, "a.png", "b.JPG", "sub/c.webp", ".hidden.png", ".dvc/x.png", "LICENSE", "README.txt", "x.png.dvc")
    write_files(here, a="\ufeffa cat\r\n\r\n  a black cat \r\n", b="", orphan="x", **{"sub/c": "größer"})
    listing = listed(here)
    assert captions(listing) == {"a.png": ("a cat", "a black cat"), "b.JPG": ("",), "sub/c.webp": ("größer",)}
    assert listing.entries[0].place == "data/raw/a.png"
    assert listing.problems == []
    assert listing.warnings == ["1 .txt files in data/raw belong to no picture and are left out"]


def test_captions_named_like_licences(here: Path) -> None:
    write_files(here, "license plate 1.png", "README.png", "notice.jpg", "LICENSE.txt")
    write_files(here, **{"license plate 1": "a plate", "README": "a page", "notice": "a sign"})
    listing = listed(here)
    assert captions(listing) == {
        "README.png": ("a page",),
        "license plate 1.png": ("a plate",),
        "notice.jpg": ("a sign",),
    }
    assert (listing.problems, listing.warnings) == ([], [])


def test_files_that_may_be_pictures_are_told(here: Path) -> None:
    write_files(here, "a.png", "c.mpo", "IMG_1.cr2", "sub/IMG_2.CR2", "without", "x.caption", a="x", c="y")
    write_files(here, "LICENSE", "README.md", "notes.md", "a.png.dvc", ".gitignore", ".DS_Store")
    listing = listed(here)
    assert sorted(captions(listing)) == ["a.png", "c.mpo"]
    assert listing.warnings == [others(4, "IMG_1.cr2, sub/IMG_2.CR2, without, ...")]


def test_files_that_rows_name_are_not_told_as_others(here: Path) -> None:
    write_files(here, "a.png", "without", "b.cr2")
    write_rows(here, [{"file_name": name, "text": "x"} for name in ("a.png", "without")])
    listing = listed(here)
    assert sorted(captions(listing)) == ["a.png", "without"]
    assert listing.warnings == [others(1, "b.cr2")]


def test_a_picture_without_its_text_file(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="cat")
    assert problems(here) == [
        "data/raw/b.png: 'b.png' has no caption; write b.txt beside it, or remove every .txt and set"
        " dataset.instance_prompt to one caption for all"
    ]
    assert captions(listed(here)) == {"a.png": ("cat",)}


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"caf\xe9", "'b.txt' is not UTF-8 text; save it as UTF-8"),
        (b"a\0b", "'b.txt' holds a control character; write the caption as plain text"),
        (b"x" * (2**20 + 1), "'b.txt' has 1,048,577 bytes; at most 1,048,576 are read, so shorten"),
    ],
)
def test_bad_text_file(here: Path, blob: bytes, message: str) -> None:
    write_files(here, "a.png", "b.png", a="cat")
    (here / "b.txt").write_bytes(blob)
    (problem,) = problems(here)
    assert problem.startswith(f"data/raw/b.png: {message}")


def test_text_files_are_opened_only_if_they_are_files(here: Path) -> None:
    write_files(here, "a.png", "b.png", "c.png", a="cat")
    os.mkfifo(here / "b.txt")
    (Path("data") / "secret.txt").write_text("secret")
    (here / "c.txt").symlink_to(Path("../secret.txt"))
    first, second = problems(here)
    assert first == "data/raw/b.png: 'b.txt' is not a regular file; replace it by one"
    assert second.startswith("data/raw/c.png: 'c.txt' is a link that leaves data/raw;")


def test_instance_prompt_for_pictures_alone(here: Path) -> None:
    write_files(here, "b.png", "a/c.png")
    assert captions(listed(here, instance_prompt="sks dog")) == {"a/c.png": ("sks dog",), "b.png": ("sks dog",)}


def test_pictures_without_captions_show_all_three_ways(here: Path) -> None:
    write_files(here, "a.png")
    assert refusal(here) == (
        "data/raw: pictures without captions; write metadata.jsonl with rows such as"
        ' {"file_name": "red-apple.png", "text": "red apple"}, or red-apple.txt beside red-apple.png,'
        " or set dataset.instance_prompt to one caption for all"
    )


def test_instance_prompt_beside_captions(here: Path) -> None:
    write_files(here, "a.png", a="cat")
    assert refusal(here, instance_prompt="sks dog") == (
        "params.yaml dataset.instance_prompt: 'sks dog' would replace the captions in the .txt files of data/raw;"
        " set it to null, or in dataset.subsets for the folder without captions only"
    )
    write_rows(here, [{"file_name": "a.png", "text": "cat"}])
    subsets = [{"path": ".", "instance_prompt": "sks dog"}]
    assert refusal(here, subsets=subsets).startswith(
        "params.yaml dataset.subsets.0.instance_prompt: 'sks dog' would replace the captions in data/raw/metadata"
    )
    write_rows(here, [{"file_name": "a.png"}])
    assert captions(listed(here, instance_prompt="sks dog")) == {"a.png": ("sks dog",)}
