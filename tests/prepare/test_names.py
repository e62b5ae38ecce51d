"""Which names are refused, what is not followed, and that no picture is opened."""

from __future__ import annotations

import os
import socket
import unicodedata
from pathlib import Path

import pytest

from lora_dag.pictures import formats
from stages.prepare import names
from tests.conftest import picture, write_rows
from tests.helpers.sources import listed, problems, write_files


def test_suffixes_of_pictures_are_those_that_can_be_read() -> None:
    assert {suffix for suffixes in formats.SUFFIXES.values() for suffix in suffixes} < names.SUFFIXES


def test_nothing_but_regular_files_inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, "ok.png")
    write_files(Path("data/elsewhere"), "x.png")
    (here / "inside.png").symlink_to("ok.png")
    (here / "outside.png").symlink_to("../elsewhere/x.png")
    (here / "dangling.png").symlink_to("nothing.png")
    (here / "loop.png").symlink_to("loop.png")
    (here / "folder.png").mkdir()
    (here / "others").symlink_to("../elsewhere")
    os.mkfifo(here / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "socket.jpg"))
        listing = listed(here, instance_prompt="x")
    assert [entry.file_name for entry in listing.entries] == ["inside.png", "ok.png"]
    assert "(pictures linked by DVC: dvc config cache.type reflink,hardlink,copy," in str(listing.problems[4])
    leaves = "is a link that leaves data/raw; put the picture itself there"
    assert [str(problem).split(" (")[0] for problem in listing.problems] == [
        "data/raw/dangling.png: 'dangling.png' is no file in data/raw, but a link to nothing; restore what it links to",
        "data/raw/fifo.jpg: 'fifo.jpg' is not a regular file; replace it by one",
        "data/raw/folder.png: 'folder.png' is not a regular file; replace it by one",
        "data/raw/loop.png: 'loop.png' is no file in data/raw, but a link to nothing; restore what it links to",
        f"data/raw/outside.png: 'outside.png' {leaves}",
        "data/raw/socket.jpg: 'socket.jpg' is not a regular file; replace it by one",
        "data/raw/others: 'others' is a link to a folder; put the pictures themselves there, or name the folder in"
        " dataset.subsets",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"-rf.png", "data/raw/-rf.png: '-rf.png' starts with '-', which commands take for an option; rename the file"),
        (b"a\n.png", 'data/raw/"a\\n.png": "a\\n.png" holds a control character; rename the file'),
        (b"a\xff.png", 'data/raw/"a\\udcff.png": "a\\udcff.png" holds a control character; rename the file'),
    ],
)
def test_names_that_are_unsafe(here: Path, name: bytes, message: str) -> None:
    write_files(here, "ok.png")
    (Path(os.fsdecode(os.fsencode(here) + b"/" + name))).write_bytes(b"")
    (problem,) = problems(here, instance_prompt="x")
    assert problem.startswith(message)
    problem.encode("utf-8")


@pytest.mark.parametrize(
    "names", [("A.png", "a.png"), (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png"))]
)
def test_names_that_collide_elsewhere(here: Path, names: tuple[str, str]) -> None:
    write_files(here, *names)
    assert problems(here, instance_prompt="x") == [
        f"data/raw/{names[1]}: '{names[1]}' and '{names[0]}' are one file where case or accents do not count;"
        " rename one"
    ]


def test_no_picture_is_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.mkdir()
    picture(0).save(here / "a.png")
    write_rows(here, [{"file_name": "a.png", "text": "x"}])
    (here / "a.png").chmod(0)
    opened: list[str] = []
    actual = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: (opened.append(str(path)), actual(path, *args))[1])
    listed(here)
    assert opened == ["data/raw/metadata.jsonl"]


@pytest.mark.parametrize("folder", ["@eaDir/a.png", "__MACOSX", "$RECYCLE.BIN", "#recycle", "sub/@eaDir"])
def test_folders_of_operating_systems_are_not_entered(here: Path, folder: str) -> None:
    write_files(here, "a.png", f"{folder}/b.png", f"{folder}/c.jpg")
    (here / "@eaDir").mkdir(exist_ok=True)
    listing = listed(here, instance_prompt="x")
    assert [entry.file_name for entry in listing.entries] == ["a.png"]
    assert (listing.problems, listing.warnings) == ([], [])
