"""Safe names, and the files of a folder: refusals, links, and that no image is opened."""

from __future__ import annotations

import os
import socket
import unicodedata
from pathlib import Path

import pytest

from lora_dag.images import file_formats
from stages.prepare import file_tree
from tests.helpers.errors import assert_are, assert_is
from tests.helpers.sources import listed, problems, write_files
from tests.helpers.workspace import make_image, write_rows


def test_image_suffixes_include_all_readable_formats() -> None:
    assert {suffix for suffixes in file_formats.SUFFIXES.values() for suffix in suffixes} < file_tree.IMAGE_SUFFIXES


def test_only_regular_files_inside_the_source(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert_are(
        listing.problems,
        ("file-missing", "data/raw/dangling.png: 'dangling.png'"),
        ("file-not-regular", "data/raw/fifo.jpg: 'fifo.jpg'"),
        ("file-not-regular", "data/raw/folder.png: 'folder.png'"),
        ("file-missing", "data/raw/loop.png: 'loop.png'"),
        ("name-outside-source", "data/raw/outside.png: 'outside.png'", "dvc config cache.type reflink,hardlink,copy"),
        ("file-not-regular", "data/raw/socket.jpg: 'socket.jpg'"),
        ("folder-linked", "data/raw/others: 'others'", "dataset.subsets"),
    )


@pytest.mark.parametrize(
    ("name", "start"),
    [
        (b"-rf.png", "data/raw/-rf.png: '-rf.png'"),
        (b"a\n.png", 'data/raw/"a\\n.png": "a\\n.png"'),
        (b"a\xff.png", 'data/raw/"a\\udcff.png": "a\\udcff.png"'),
    ],
)
def test_names_that_are_unsafe(here: Path, name: bytes, start: str) -> None:
    write_files(here, "ok.png")
    (Path(os.fsdecode(os.fsencode(here) + b"/" + name))).write_bytes(b"")
    (problem,) = problems(here, instance_prompt="x")
    assert_is(problem, "name-unsafe", start)
    problem.encode("utf-8")


@pytest.mark.parametrize(
    "names", [("A.png", "a.png"), (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png"))]
)
def test_names_that_collide_elsewhere(here: Path, names: tuple[str, str]) -> None:
    write_files(here, *names)
    (problem,) = problems(here, instance_prompt="x")
    assert_is(problem, "names-clash", f"data/raw/{names[1]}: '{names[1]}'", f"'{names[0]}'")


def test_no_image_is_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.mkdir()
    make_image(0).save(here / "a.png")
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
