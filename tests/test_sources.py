from __future__ import annotations

import json
import os
import socket
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest

from stages.core import pictures
from stages.core.console import UserError
from stages.core.containers import PictureFiles
from stages.prepare import names
from tests.conftest import picture, write_rows
from tests.sources import (
    captions,
    embedded,
    listed,
    png,
    problems,
    refusal,
    write_files,
    write_parquet,
    write_tar,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    return Path("data/raw")


# The kinds of sources


def test_metadata_folders_as_datasets_reads_them(here: Path) -> None:
    for split in ("train", "test"):
        write_files(here / split, "0.png", "deep/1.jpg")
        write_rows(here / split, [{"file_name": name, "text": split} for name in ("deep/1.jpg", "./0.png")])
    listing = listed(here)
    assert [(entry.file_name, entry.place, entry.split) for entry in listing.entries] == [
        ("test/deep/1.jpg", "data/raw/test/metadata.jsonl:1", "test"),
        ("test/0.png", "data/raw/test/metadata.jsonl:2", "test"),
        ("train/deep/1.jpg", "data/raw/train/metadata.jsonl:1", "train"),
        ("train/0.png", "data/raw/train/metadata.jsonl:2", "train"),
    ]
    assert (listing.problems, listing.unlisted, listing.warnings) == ([], [], [])


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


def others(count: int, shown: str, place: str = "data/raw") -> str:
    return (
        f"{count} files in {place} are no pictures by their suffix and are left out ({shown}); convert those that are"
    )


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


def test_files_beside_containers_are_told(here: Path) -> None:
    write_tar(here / "00.tar", {"0.png": png(), "0.txt": "x"})
    write_files(here, "01.zip", "README.md")
    assert listed(here).warnings == [others(1, "01.zip")]


def test_suffixes_of_pictures_are_those_that_can_be_read() -> None:
    assert {suffix for suffixes in pictures.SUFFIXES.values() for suffix in suffixes} < names.SUFFIXES


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


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_containers(here: Path, suffix: str, named: str) -> None:
    for shard in range(2):
        path = here / "data" / f"train-{shard:05}-of-00002.{suffix}"
        if suffix == "parquet":
            write_parquet(path, {"image": embedded(2), "text": ["one", "two"]})
        else:
            write_tar(path, {"0.png": png(0), "0.txt": "one", "1.png": png(1), "1.txt": "two"})
    (here / "README.md").write_text("x")
    source = here if named == "folder" else here / "data" / f"train-00000-of-00002.{suffix}"
    listing = listed(source)
    inner = ("0", "1") if suffix == "parquet" else ("0.png", "1.png")
    first, count = ("data/", 2) if named == "folder" else ("", 1)
    expected = [f"{first}train-0000{shard}-of-00002.{suffix}::{name}" for shard in range(count) for name in inner]
    assert [entry.file_name for entry in listing.entries] == expected
    assert [entry.captions for entry in listing.entries] == [("one",), ("two",)] * count
    assert {entry.split for entry in listing.entries} == {"train"}
    assert listing.entries[0].place == f"data/raw/data/train-00000-of-00002.{suffix}::{inner[0]}"
    files = PictureFiles(str(source))
    assert [files.read(name) for name in expected] == [png(0), png(1)] * count


def test_containers_beside_pictures(here: Path) -> None:
    write_files(here, "preview.png")
    write_tar(here / "00.tar", {"0.png": png(), "0.txt": "x"})
    assert refusal(here).startswith("data/raw: holds containers (00.tar) and loose files (preview.png); put them in")
    write_rows(here, [{"file_name": "preview.png", "text": "x"}])
    assert listed(here).warnings == ["1 .parquet or .tar files in data/raw are not read beside metadata.jsonl"]


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_containers_of_nothing(here: Path, suffix: str) -> None:
    path = here / f"a.{suffix}"
    if suffix == "parquet":
        write_parquet(path, {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    else:
        write_tar(path, {})
    assert refusal(here) == f"data/raw/a.{suffix}: no pictures; the dataset is empty"


# Parquet


def test_captions_of_parquet_rows(here: Path) -> None:
    texts = [["a", "b"], [], None, ["c", None]]
    write_parquet(here / "a.parquet", {"photo": embedded(4), "caption": texts})
    listing = listed(here, caption_column="caption")
    assert captions(listing) == {"a.parquet::0": ("a", "b")}
    assert [str(problem) for problem in listing.problems] == [
        f'data/raw/a.parquet::{row}: caption: got {got}; expected a string or a list of strings, "" for no caption'
        for row, got in ((1, "[]"), (2, "null"), (3, '["c", null]'))
    ]
    assert [problem.file_name for problem in listing.problems] == ["a.parquet::1", "a.parquet::2", "a.parquet::3"]


def test_caption_column_of_parquet(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(1), "label": ["x"], "note": ["y"]})
    assert refusal(here) == (
        "params.yaml dataset.caption_column: 'text' is no column of data/raw/a.parquet; it has label, note"
    )
    assert captions(listed(here, instance_prompt="sks")) == {"a.parquet::0": ("sks",)}
    write_parquet(here / "b.parquet", {"image": embedded(1), "text": ["x"]})
    assert problems(here) == [
        "data/raw/a.parquet::0: 'a.parquet::0' has no 'text'; add that column, or leave its file out"
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": ["x"]},
            "has no column of embedded pictures, such as 'image' with bytes; it has text (string)",
        ),
        (
            {"image": [{"bytes": "x"}]},
            "has no column of embedded pictures, such as 'image' with bytes; it has image (struct<bytes: string>)",
        ),
        (
            {"image": [{"bytes": [b"x"]}]},
            "has no column of embedded pictures, such as 'image' with bytes; it has image (struct<bytes: list<element:"
            " binary>>)",
        ),
        ({"a": [{"bytes": b"x"}], "b": [{"bytes": b"x"}]}, "has pictures in a, b; name the column to use 'image'"),
        ({"a": [b"x"], "b": [b"x"]}, "has pictures in a, b; name the column to use 'image'"),
    ],
)
def test_image_column(here: Path, columns: dict[str, list[object]], message: str) -> None:
    write_parquet(here / "x.parquet", columns)
    assert refusal(here) == f"'data/raw/x.parquet' {message}"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([2**31 - 1], pa.date32()), "date32[day]"),  # no date that Python has
        (pa.array([2**62], pa.timestamp("ms")), "timestamp[ms]"),
        (pa.array([1], pa.timestamp("ms", "Nowhere/At_all")), "timestamp[ms, tz=Nowhere/At_all]"),
        (pa.array([7]), "int64"),
    ],
)
def test_caption_columns_that_hold_no_text(here: Path, values: pa.Array, kind: str) -> None:
    write_parquet(here / "x.parquet", {"image": embedded(1), "text": values})
    assert refusal(here) == (f"data/raw/x.parquet: column 'text' is of type {kind}; expected text or lists of text")


def test_split_columns_that_hold_no_text(here: Path) -> None:
    """``datasets`` writes class labels as numbers; who holds no named split out need not care."""
    write_parquet(here / "x.parquet", {"image": embedded(1), "text": ["x"], "split": [1]})
    assert captions(listed(here)) == {"x.parquet::0": ("x",)}
    write_files(Path("data/test"), "a.png", a="x")
    subsets = [{"path": "raw"}, {"path": "test"}]
    assert problems("data", subsets=subsets, heldout_fraction=None, heldout_split="test") == [
        "data/raw/x.parquet::0: split: got a value of type int64; expected the name of a split, such as 'test'"
    ]


def test_parquet_captions_that_are_no_utf8(here: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers())
    write_parquet(here / "x.parquet", {"image": embedded(2), "text": texts})
    assert problems(here) == ["data/raw/x.parquet::1: not UTF-8 text; save the file as UTF-8"]


def test_categories_are_text(here: Path) -> None:
    values = pa.array(["x", "y"]).dictionary_encode()
    write_parquet(here / "x.parquet", {"image": embedded(2), "text": values})
    assert list(captions(listed(here)).values()) == [("x",), ("y",)]


def test_parquet_of_nulls_is_one_line(here: Path) -> None:
    num_rows = 10_001
    blobs = pa.array([png()] * num_rows)
    write_parquet(here / "x.parquet", {"image": blobs, "text": pa.nulls(num_rows, pa.string())})
    assert refusal(here) == ("data/raw/x.parquet: column 'text' is null in all 10,001 rows; write text, \"\" for none")
    write_parquet(here / "x.parquet", {"image": pa.nulls(num_rows, pa.binary()), "text": ["x"] * num_rows})
    assert refusal(here) == (
        "data/raw/x.parquet: column 'image' holds no picture in any of 10,001 rows; embed their bytes"
    )


def test_struct_is_preferred_to_binary_column(here: Path) -> None:
    write_parquet(here / "x.parquet", {"hash": [b"x"], "photo": embedded(1), "text": ["x"]})
    listed(here)
    assert PictureFiles(str(here)).read("x.parquet::0") == png(0)


# WebDataset


def test_members_of_a_tar(here: Path) -> None:
    members: dict[str, bytes | str] = {
        "./train/0.png": png(),
        "train/0.json": json.dumps({"text": ["a", "b"], "split": "eval"}),
        "train/0.txt": "not this one",
        "train/1.JPEG": png(),
        "train/1.json": json.dumps({"url": "x"}),
        "train/1.txt": "one\n\ntwo\n",
        "train/._1.JPEG": b"",
        "train/2.txt": "orphan",
        "train/3.png": png(),
        "a.seg.png": png(),
        "a.png": png(),
        "a.txt": "x",
    }
    write_tar(here / "00.tar", members)
    listing = listed(here)
    assert captions(listing) == {"00.tar::train/0.png": ("a", "b"), "00.tar::train/1.JPEG": ("one", "two")}
    assert [entry.split for entry in listing.entries] == ["eval", "train"]
    assert [str(problem) for problem in listing.problems] == [
        "data/raw/00.tar::train/3.png: '00.tar::train/3.png' has no 'text'; pack a .txt beside it, or leave its file"
        " out",
        "data/raw/00.tar::a.seg.png: 'a' has 2 pictures (a.seg.png, a.png); keep one",
    ]
    assert listing.warnings == ["1 captions in data/raw/00.tar belong to no picture"]


def test_tar_without_captions(here: Path) -> None:
    write_tar(here / "00.tar", {"0.png": png()})
    assert refusal(here).startswith("data/raw/00.tar: pictures without captions; pack a .txt or a .json with 'text' ")
    assert captions(listed(here, instance_prompt="sks")) == {"00.tar::0.png": ("sks",)}
    write_tar(here / "00.tar", {"0.png": png(), "0.json": '{"caption": "x"}'})
    assert refusal(here) == (
        "params.yaml dataset.caption_column: 'text' is no column of data/raw/00.tar; it has caption"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../0.png": b"", "../0.txt": "x"}, "data/raw/00.tar::../0.png: '../0.png' leaves data/raw/00.tar;"),
        ({"/0.png": b"", "/0.txt": "x"}, "data/raw/00.tar::/0.png: '/0.png' leaves data/raw/00.tar;"),
        ({"a\n.png": b"", "a\n.txt": "x"}, 'data/raw/"00.tar::a\\n.png": "a\\n.png" holds a control character;'),
        ({"0.png": b"", "0.txt": b"\xff"}, "data/raw/00.tar::0.png: '0.txt' is not UTF-8 text;"),
        ({"0.png": b"", "0.json": "{"}, "data/raw/00.tar::0.png: '0.json' is no valid JSON (Expecting"),
        ({"0.png": b"", "0.json": "[]"}, "data/raw/00.tar::0.png: '0.json' holds a list; expected one JSON object"),
        ({"0.png": b"", "0.json": '{"text": 3}'}, "data/raw/00.tar::0.png: text: got 3; expected a string"),
        (
            {"0.png": b"", "0.json": '{"text": "x", "text": "y"}'},
            "data/raw/00.tar::0.png: '0.json': \"text\" stands there twice; remove one",
        ),
        ({"0.png": b"", "0.txt": "a", "0.seg.txt": "b"}, "data/raw/00.tar::0.png: '0' has 2 .txt members (0.txt, 0.s"),
        ({"0.png": b"", "0.json": "{}", "0.x.json": "{}"}, "data/raw/00.tar::0.png: '0' has 2 .json members (0.json, "),
        ({"0.png": b"", "0.txt": "a\x1bb"}, "data/raw/00.tar::0.png: '0.txt' holds a control character; write"),
    ],
)
def test_bad_member(here: Path, members: dict[str, bytes | str], message: str) -> None:
    write_tar(here / "00.tar", {"ok.png": b"", "ok.txt": "x"} | members)
    (problem,) = problems(here)
    assert problem.startswith(message)


def test_links_in_a_tar_are_no_pictures(here: Path) -> None:
    path = write_tar(here / "00.tar", {"a.png": png(), "a.txt": "x"})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png"), (tarfile.REGTYPE, "a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert problems(here) == [
        "data/raw/00.tar::b.png: 'b.png' is a link or device, not a picture; pack the files anew",
        "data/raw/00.tar::c.png: 'c.png' is a link or device, not a picture; pack the files anew",
        "data/raw/00.tar::a.png: 'a.png' stands there twice; pack the files anew",
    ]


def test_all_broken_containers_at_once(here: Path) -> None:
    write_files(here, "a.parquet", "b.tar")
    (Path("data") / "c.tar").write_bytes(b"")
    (here / "c.tar").symlink_to("../c.tar")
    os.mkfifo(here / "d.tar")
    (here / "e.tar.gz").write_bytes(b"\x1f\x8b\x08\0")
    with pytest.raises(UserError) as caught:
        listed(here)
    lines = caught.value.problems
    assert [line.split(";")[0] for line in lines] == [
        "'data/raw/a.parquet' is no Parquet file, or a damaged one (Parquet file size is 0 bytes)",
        "'data/raw/b.tar' is no .tar file, or a damaged one (empty file)",
        "data/raw/c.tar: 'c.tar' is a link that leaves data/raw",
        "data/raw/d.tar: 'd.tar' is not a regular file",
        "'data/raw/e.tar.gz' is compressed",
    ]


# Sources that are none


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/none", "'data/none' is no folder; `dvc pull` brings tracked data, or name a folder of your own"),
        ("acme/icons@main", "the lines `hub: acme/icons`, `revision: the commit's 40 hex digits`"),
        ("acme/icons", "write a file such as data/pin.yaml with the lines `hub: acme/icons`"),
        (f"acme/icons@{'ab' * 20}", f"`revision: {'ab' * 20}`"),
        ("https://huggingface.co/datasets/acme/icons", "with the lines `hub: acme/icons`"),
    ],
)
def test_missing_source(here: Path, source: str, message: str) -> None:
    problem = refusal(source)
    assert problem.startswith(f"params.yaml dataset.source: '{source}' is no folder; ")
    assert message in problem


def test_source_of_another_kind(here: Path) -> None:
    write_files(here, "a.zip", "b.md")
    assert refusal(here / "a.zip") == (
        "data/raw/a.zip: expected a folder, a .parquet or .tar file, or a .yaml file that pins a Hub dataset"
    )
    assert refusal(here) == (
        "data/raw: no pictures, no metadata.jsonl and no .parquet or .tar files; the dataset is empty"
        " (found 1 .md, 1 .zip)"
    )


def test_source_that_would_hang(here: Path) -> None:
    os.mkfifo("data/a.tar")
    assert refusal("data/a.tar").startswith("data/a.tar: expected a folder, a .parquet or .tar file,")


def test_the_current_folder_as_source(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, "a.png", a="x")
    monkeypatch.chdir(here)
    assert [(entry.file_name, entry.place) for entry in listed(".").entries] == [("a.png", "a.png")]


# Subsets


def test_subsets_of_every_kind(here: Path) -> None:
    write_files(here / "mine", "a.png", a="cat")
    write_files(here / "class", "b.png")
    write_tar(here / "00.tar", {"c.png": png(), "c.txt": "x"})
    subsets = [
        {"path": "./mine/", "repeats": 3},
        {"path": "class", "instance_prompt": "a dog", "regularization": True},
        {"path": "00.tar"},
    ]
    listing = listed(here, subsets=subsets)
    assert [(entry.file_name, entry.captions, entry.subset) for entry in listing.entries] == [
        ("mine/a.png", ("cat",), 0),
        ("class/b.png", ("a dog",), 1),
        ("00.tar::c.png", ("x",), 2),
    ]


def test_subsets_that_overlap(here: Path) -> None:
    write_files(here, "ink/a.png", "ink/b.png", "c.png")
    subsets = [{"path": "."}, {"path": "ink"}]
    assert refusal(here, subsets=subsets, instance_prompt="x") == (
        "params.yaml dataset.subsets: '.' and 'ink' both list 2 pictures, such as 'ink/a.png';"
        " choose paths that do not overlap, and use repeats to show pictures more often"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../other", "path '../other' leaves data/raw; expected a name relative to that folder"),
        ("/etc", "path '/etc' leaves data/raw; expected a name relative to that folder"),
        ("none", "path 'none' is neither folder nor file in data/raw; add it or correct the path"),
        ("link", "path 'link' is a link that leaves data/raw; put the pictures themselves there"),
        ("a\n", 'path "a\\n" holds a control character; rename the file'),
    ],
)
def test_subset_that_leaves_the_source(here: Path, path: str, message: str) -> None:
    write_files(here, "a.png", a="x")
    write_files(Path("data/other"), "a.png", a="x")
    (here / "link").symlink_to("../other")
    assert refusal(here, subsets=[{"path": path}]) == f"params.yaml dataset.subsets: {message}"


def test_subsets_below_a_file(here: Path) -> None:
    write_tar(here / "00.tar", {"c.png": png(), "c.txt": "x"})
    assert refusal(here / "00.tar", subsets=[{"path": "c"}]) == (
        "params.yaml dataset.subsets: 'c' cannot be below data/raw/00.tar, which is a file"
    )


def test_every_bad_subset_and_every_problem_at_once(here: Path) -> None:
    write_files(here / "mine", "a.png", "b.png", a="cat")
    write_files(here / "none")
    (here / "none").mkdir()
    subsets = [{"path": "mine"}, {"path": "none"}, {"path": "absent"}]
    with pytest.raises(UserError) as caught:
        listed(here, subsets=subsets)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "data/raw/none",
        "params.yaml dataset.subsets",
        "data/raw/mine/b.png",
    ]
    with pytest.raises(UserError) as caught:
        listed(here, subsets=subsets, on_bad="skip")
    assert len(caught.value.problems) == 2


def test_kohya_repeats_in_folder_names(here: Path) -> None:
    write_files(here, "10_sks dog/a.png")
    assert listed(here, instance_prompt="x").warnings == [
        "folder names such as '10_sks dog' set no repeats here; write dataset.subsets:"
        " [{path: 10_sks dog, repeats: 10}]"
    ]


# What must not be followed or opened


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
        (b"a::b.png", "data/raw/a::b.png: 'a::b.png' holds '::', which stands between a container and what it holds;"),
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


# Masks


def test_masks_below_each_subset(here: Path) -> None:
    write_files(here, "one/a.png", "one/sub/b.jpg", "one/masks/a.png", "one/masks/sub/b.webp", "one/masks/c.png")
    write_files(here, "two/a.png", "class/a.png")
    (here / "two/masks").mkdir()
    subsets = [{"path": "one"}, {"path": "two"}, {"path": "class", "regularization": True}]
    listing = listed(here, subsets=subsets, instance_prompt="x", mask="masks")
    assert {entry.file_name: entry.mask for entry in listing.entries} == {
        "one/a.png": "one/masks/a.png",
        "one/sub/b.jpg": "one/masks/sub/b.webp",
        "class/a.png": None,
    }
    assert [(str(problem), problem.file_name) for problem in listing.problems] == [
        (
            "data/raw/two/a.png: 'two/a.png' has no mask in folder 'masks'; add one of the same name, white all over"
            " for all of it",
            "two/a.png",
        )
    ]
    assert listing.warnings == ["1 masks in data/raw/one belong to no picture and are left out"]


def test_masks_beside_metadata_are_no_pictures(here: Path) -> None:
    write_files(here, "a.png", "masks/a.png")
    write_rows(here, [{"file_name": "a.png", "text": "x"}])
    listing = listed(here, mask="masks")
    assert ([entry.mask for entry in listing.entries], listing.unlisted) == (["masks/a.png"], [])


def test_bad_masks(here: Path) -> None:
    write_files(here, "a.png", "b.png", "masks/a.png", "masks/a.jpg")
    (Path("data") / "secret.png").write_bytes(b"")
    (here / "masks/b.png").symlink_to("../../secret.png")
    first, second = problems(here, instance_prompt="x", mask="masks")
    assert first == "data/raw/a.png: 'a.png' has 2 masks (masks/a.jpg, masks/a.png); keep one"
    assert second.startswith("data/raw/b.png: 'masks/b.png' is a link that leaves data/raw;")


def test_no_folder_of_masks(here: Path) -> None:
    write_files(here, "a.png")
    assert refusal(here, instance_prompt="x", mask="mask") == (
        "params.yaml dataset.mask: no folder 'mask' in data/raw; add it, or null"
    )
    (here / "link").symlink_to("../..")
    assert refusal(here, instance_prompt="x", mask="../m").startswith(
        "params.yaml dataset.mask: '../m' leaves data/raw;"
    )
    assert refusal(here, instance_prompt="x", mask="link").startswith(
        "params.yaml dataset.mask: 'link' is a link that leaves data/raw;"
    )


def test_masks_of_containers(here: Path) -> None:
    write_tar(here / "00.tar", {"c.png": png(), "c.txt": "x"})
    assert len(listed(here, mask="alpha").entries) == 1
    assert refusal(here, mask="masks") == (
        "params.yaml dataset.mask: 'masks' is a folder, and data/raw holds containers, whose pictures can have a mask"
        " in their alpha channel only; set it to alpha or null"
    )


def test_mask_folder_that_is_the_source(here: Path) -> None:
    write_files(here, "a.png", a="x")
    for mask in (".", "./"):
        assert refusal(here, mask=mask) == (
            f"params.yaml dataset.mask: '{mask}' is the folder of the pictures themselves; name a folder below it that"
            " holds the masks alone"
        )


@pytest.mark.parametrize("suffix", ["tar", "parquet", "yaml"])
def test_source_file_whose_name_holds_the_separator(here: Path, suffix: str) -> None:
    path = Path(f"data/a::b.{suffix}")
    path.write_bytes(b"")
    assert refusal(path) == (
        f"params.yaml dataset.source: 'a::b.{suffix}' holds '::', which stands between a file and what it holds; rename"
        " the file"
    )


# What is said of captions


def test_captions_that_are_no_captions_are_told(here: Path) -> None:
    write_files(here, "a.png", "b.png", "c.png", a=", ,", b="one, two", c="")
    assert listed(here).warnings == ["1 captions hold nothing but commas"]
    varied = {"shuffle_tags": True, "num_caption_variants": 4}
    assert listed(here, **varied, keep_tags=2).warnings == [
        "1 captions hold nothing but commas",
        "no caption has more than 2 tags, so that with dataset.keep_tags 2 none is moved or dropped",
    ]
    assert listed(here, **varied, keep_tags=1).warnings == ["1 captions hold nothing but commas"]


def test_variants_without_a_tag_are_told(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="one", b="one, two, three, four, five, six, seven, eight, nine")
    changes = {"tag_dropout": 0.5, "num_caption_variants": 8}
    (warning,) = listed(here, **changes).warnings
    assert warning.endswith(
        " variants of 1 captions have no tag left and are learned without a prompt; lower dataset.tag_dropout 0.5, or"
        " raise dataset.keep_tags 0"
    )
    assert 0 < int(warning.split()[0]) < 8
    assert listed(here, **changes, keep_tags=1).warnings == []
    assert listed(here, **changes, caption_prefix="sks").warnings == []
