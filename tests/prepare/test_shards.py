"""Parquet and WebDataset: captions, columns, members, and what is wrong with them."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from lora_dag.core.console import UserError
from lora_dag.pictures.containers import PictureFiles
from tests.conftest import write_rows
from tests.helpers.sources import (
    captions,
    embedded,
    listed,
    others,
    png,
    problems,
    refusal,
    write_files,
    write_parquet,
    write_tar,
)

# Both kinds


def test_files_beside_containers_are_told(here: Path) -> None:
    write_tar(here / "00.tar", {"0.png": png(), "0.txt": "x"})
    write_files(here, "01.zip", "README.md")
    assert listed(here).warnings == [others(1, "01.zip")]


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
    assert listed(here).warnings == ["1 .parquet or .tar file in data/raw is not read beside metadata.jsonl"]


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
    assert listing.warnings == ["1 caption in data/raw/00.tar belongs to no picture"]


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
        ({"0.png": b"", "0.txt": "a", "0.seg.txt": "b"}, "data/raw/00.tar::0.png: '0' has 2 caption members (0.txt, "),
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
