"""`lora-dag import`: Parquet, WebDataset and Hub datasets -> the folder of images that the stages read."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lora_dag import commands
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_file
from stages.prepare.names import printable
from stages.prepare.sources import UNFINISHED
from tests.conftest import REPOSITORY, picture
from tests.helpers.sources import (
    captions,
    embedded,
    listed,
    png,
    refusal,
    splits,
    write_files,
    write_parquet,
    write_tar,
)

MINE = Path("data/mine")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds what is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    Path("data").mkdir()
    return Path("data/raw")


def imported(source: Path | str, *options: str) -> Path:
    args = commands.parse(["import", str(source), str(MINE), *options])
    args.main(args)
    return MINE


def problems(source: Path | str, *options: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        imported(source, *options)
    assert not MINE.exists() and not Path("data/mine.partial").exists()
    return list(caught.value.problems)


def rows(split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MINE / split / "metadata.jsonl").read_text().splitlines()]


def files(folder: Path = MINE) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_shards(here: Path, suffix: str) -> None:
    for split in ("train", "test"):
        path = here / "data" / f"{split}-00000-of-00001.{suffix}"
        if suffix == "parquet":
            write_parquet(path, {"image": embedded(2), "text": ["one", "two"]})
        else:
            write_tar(path, {"0.png": png(0), "0.txt": "one", "1.png": png(1), "1.txt": "two"})


# From shards to a source


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_folder_of_shards_becomes_a_source(here: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(here, suffix)
    (here / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Mine\n")
    caplog.set_level("INFO")
    imported(here)
    metadata = "metadata.jsonl"
    names = [f"{split}/{name}" for split in ("test", "train") for name in ("0.png", "1.png", metadata)]
    assert files() == ["provenance.json", *names]
    assert [(MINE / split / f"{i}.png").read_bytes() for split in ("train", "test") for i in range(2)] == [
        png(0),
        png(1),
    ] * 2
    listing = listed(MINE, heldout_fraction=None, heldout_split="test")
    assert captions(listing)["train/0.png"] == ("one",) and captions(listing)["test/1.png"] == ("two",)
    assert splits(listing) == {name: name.partition("/")[0] for name in names if not name.endswith(metadata)}
    assert (listing.problems, listing.warnings) == ([], [])
    shards = sorted((here / "data").iterdir())
    assert json.loads((MINE / "provenance.json").read_text()) == {
        "files": {f"data/{path.name}": sha256_file(path) for path in shards},
        "num_left_out": 0,
        "license": "cc0-1.0",
    }
    assert caplog.messages[-1] == "next        dvc add data/mine"
    assert not Path("data/mine.partial").exists()


@pytest.mark.parametrize("way", ["dots", "link"])
def test_a_folder_of_shards_by_another_path(here: Path, tmp_path: Path, way: str) -> None:
    write_shards(here, "tar")
    Path("link").symlink_to(here, target_is_directory=True)
    imported(Path("data/../data/raw") if way == "dots" else Path("link"))
    assert len(files()) == 7


def test_a_mask_column_that_is_not_there(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(1), "text": ["one"]})
    (line,) = problems(here, "--mask-column", "nope")
    assert "--mask-column 'nope' is no column of bytes of images; it has image" in line


def test_a_member_that_is_a_folder_of_another(here: Path) -> None:
    write_tar(here / "a.tar", {"a.png": png(0), "a.txt": "one", "a.png/b.png": png(1), "a.png/b.txt": "two"})
    assert any("a file and a folder of this name are in the source; --number" in line for line in problems(here))


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name(here: Path, folder: str) -> None:
    write_shards(here, "tar")
    args = commands.parse(["import", str(here), folder])
    with pytest.raises(UserError, match="needs a name of its own|inside of"):
        args.main(args)


def test_datasets_reads_the_result_back(here: Path) -> None:
    from datasets import load_dataset

    write_shards(here, "parquet")
    found = load_dataset("imagefolder", data_dir=str(imported(here)), streaming=True)
    assert {split: [row["text"] for row in found[split]] for split in found} == {
        "train": ["one", "two"],
        "test": ["one", "two"],
    }


def test_the_same_source_gives_the_same_bytes_anywhere(here: Path, tmp_path: Path) -> None:
    write_shards(here, "parquet")
    imported(here)
    first = {name: (MINE / name).read_bytes() for name in files()}
    MINE.rename("data/first")
    here.rename("data/elsewhere")
    imported(tmp_path / "data/elsewhere")
    assert {name: (MINE / name).read_bytes() for name in files()} == first


def test_one_file_is_a_source(here: Path) -> None:
    write_shards(here, "tar")
    imported(here / "data/test-00000-of-00001.tar")
    assert [row["file_name"] for row in rows("train")] == ["0.png", "1.png"]


def test_splits_by_the_header_of_the_readme(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(1), "text": ["x"]})
    write_parquet(here / "b.parquet", {"image": embedded(1), "text": ["y"]})
    files_of = "data_files:\n  - split: {}\n    path: {}.parquet\n"
    pairs = (("one", "a"), ("two", "b"))
    configs = [f"- config_name: {name}\n  " + files_of.format(name, file) for name, file in pairs]
    (here / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    (problem,) = problems(here)
    assert problem.startswith("data/raw: Config name is missing.") and problem.endswith("; see --config")
    imported(here, "--config", "two")
    assert rows("two") == [{"file_name": "0.png", "text": "y"}]


def test_a_split_column_decides_row_by_row(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(3), "text": ["x", "y", "z"], "split": ["test", "train", None]})
    imported(here)
    assert [[row["text"] for row in rows(split)] for split in ("test", "train")] == [["x"], ["y", "z"]]


def test_numbers_in_a_split_column_are_no_names(here: Path) -> None:
    """``datasets`` writes class labels as numbers."""
    write_parquet(here / "a.parquet", {"image": embedded(1), "text": ["x"], "split": [1]})
    imported(here)
    assert len(rows("train")) == 1


def test_captions_as_the_source_has_them(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(2), "caption": [["one", "two"], ["«ünï»"]]})
    imported(here, "--caption-column", "caption")
    assert [row["text"] for row in rows()] == [["one", "two"], "«ünï»"]
    assert captions(listed(MINE)) == {"train/0.png": ("one", "two"), "train/1.png": ("«ünï»",)}


def test_without_captions_for_an_instance_prompt(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(2)})
    caplog.set_level("INFO")
    imported(here, "--no-captions")
    assert files() == ["provenance.json", "train/0.png", "train/1.png"]
    assert captions(listed(MINE, instance_prompt="sks"))["train/0.png"] == ("sks",)
    assert "captions    none; set dataset.instance_prompt to one caption for all" in caplog.messages


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_masks_go_into_a_folder_of_their_own(here: Path, suffix: str) -> None:
    if suffix == "parquet":
        columns = {"image": embedded(2), "mask": [{"bytes": png(i + 5), "path": None} for i in range(2)]}
        write_parquet(here / "a.parquet", columns | {"text": ["x", "y"]})
    else:
        members = {f"{i}.{kind}": blob for i in range(2) for kind, blob in (("png", png(i)), ("mask.png", png(i + 5)))}
        write_tar(here / "a.tar", members | {"0.txt": "x", "1.txt": "y"})
    imported(here)
    listing = listed(MINE, mask="masks")
    assert [entry.mask for entry in listing.entries] == ["masks/train/0.png", "masks/train/1.png"]
    assert (MINE / "masks/train/1.png").read_bytes() == png(6)


# Names


def test_images_without_a_name_are_named_by_file_and_row(here: Path) -> None:
    jpeg = io.BytesIO()
    picture(0).save(jpeg, format="JPEG")
    write_parquet(here / "a.parquet", {"image": [png(0), jpeg.getvalue()], "text": ["x", "y"]})
    imported(here)
    assert [row["file_name"] for row in rows()] == ["a-000000.png", "a-000001.jpg"]


def test_a_name_without_the_suffix_of_an_image_gets_one(here: Path) -> None:
    images = [{"bytes": png(0), "path": "fox"}, {"bytes": png(1), "path": "fox.v2"}, {"bytes": png(2), "path": "a.JPG"}]
    write_parquet(here / "a.parquet", {"image": images, "text": ["x", "y", "z"]})
    imported(here)
    assert [row["file_name"] for row in rows()] == ["fox.png", "fox.v2.png", "a.JPG"]


def test_names_that_collide(here: Path) -> None:
    for name in ("a", "b"):
        write_parquet(here / f"{name}.parquet", {"image": embedded(1), "text": ["x"]})
    same = "'0.png' is the name of data/raw/a.parquet row 0 too; --number names images by file and row"
    assert problems(here) == [f"data/raw/b.parquet row 0: {same}", "--skip-bad imports the others"]
    imported(here, "--number")
    assert [row["file_name"] for row in rows()] == ["a-000000.png", "b-000000.png"]


def test_names_that_collide_where_case_does_not_count(here: Path) -> None:
    write_tar(here / "a.tar", {"a.png": png(), "a.txt": "x", "A.png": png(1), "A.txt": "y"})
    assert problems(here)[0] == (
        "data/raw/a.tar::A.png: 'train/A.png' and 'train/a.png' (data/raw/a.tar::a.png) are one file where case or"
        " accents do not count; rename one; --number names images by file and row"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.png", "'../a.png' leaves data/mine"),
        ("/etc/a.png", "'/etc/a.png' leaves data/mine"),
        ("sub/../../a.png", "'sub/../../a.png' leaves data/mine"),
        ("a\n.png", '"a\\n.png" holds a control character; rename the file'),
        ("-rf.png", "'-rf.png' starts with '-', which commands take for an option; rename the file"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_unsafe_names(here: Path, suffix: str, name: str, message: str) -> None:
    if suffix == "parquet":
        write_parquet(here / "x.parquet", {"image": [{"bytes": png(), "path": name}], "text": ["x"]})
    else:
        write_tar(here / "x.tar", {name: png(), name.replace(".png", ".txt"): "x"})
    place = "data/raw/x.parquet row 0" if suffix == "parquet" else f"data/raw/x.tar::{printable(name)}"
    problem = problems(here)[0]
    assert problem.startswith(f"{place}: {message}") and problem.endswith("; --number names images by file and row")


def test_unsafe_splits(here: Path) -> None:
    write_parquet(here / "x.parquet", {"image": embedded(1), "text": ["x"], "split": ["../train"]})
    assert problems(here)[0].startswith("data/raw/x.parquet row 0: '../train' leaves ")


# Refused: rows and members


def test_every_row_that_cannot_be_used_at_once(here: Path) -> None:
    images = [
        *embedded(2),
        {"bytes": None, "path": "gone.png"},
        {"bytes": b"<html>", "path": "x.png"},
        *embedded(5)[4:],
    ]
    texts: list[Any] = ["x", None, "x", "x", []]
    write_parquet(here / "a.parquet", {"image": images, "text": [[text] if text == "x" else text for text in texts]})
    expected = 'expected a string or a list of strings, "" for no caption'
    assert problems(here) == [
        f"data/raw/a.parquet row 1: text: got null; {expected}",
        "data/raw/a.parquet row 2: column 'image' has no bytes of an image; embed them or remove the row",
        "data/raw/a.parquet row 3: is no JPEG, PNG, WebP, GIF, TIFF or BMP picture but seems to be HTML; convert it or"
        " remove it",
        f"data/raw/a.parquet row 4: text: got []; {expected}",
        "--skip-bad imports the others",
    ]


def test_bad_samples_can_be_left_out(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(here / "a.parquet", {"image": [*embedded(1), {"bytes": b"x", "path": "b.png"}], "text": ["x", "y"]})
    imported(here, "--skip-bad")
    assert [row["file_name"] for row in rows()] == ["0.png"]
    assert "warning: 1 sample is left out:" in caplog.messages
    assert json.loads((MINE / "provenance.json").read_text())["num_left_out"] == 1


def test_members_of_a_tar(here: Path) -> None:
    write_tar(
        here / "00.tar",
        {
            "./sub/0.png": png(0),
            "sub/0.json": json.dumps({"text": ["a", "b"]}),
            "sub/0.txt": "not this one",
            "1.JPEG": png(1),
            "1.json": json.dumps({"url": "x"}),
            "1.txt": "one\n\ntwo\n",
            "._1.JPEG": b"",
            "2.txt": "orphan",
        },
    )
    imported(here)
    assert rows() == [{"file_name": "sub/0.png", "text": ["a", "b"]}, {"file_name": "1.JPEG", "text": ["one", "two"]}]
    assert (MINE / "train/1.JPEG").read_bytes() == png(1)


def test_images_of_several_formats_in_one_tar(here: Path) -> None:
    """``datasets`` refuses this, which most packers of folders make."""
    names = ("a.png", "b.jpg", "c.webp")
    write_tar(
        here / "00.tar", {name: png(i) for i, name in enumerate(names)} | {"a.txt": "x", "b.txt": "y", "c.txt": "z"}
    )
    imported(here)
    assert [row["file_name"] for row in rows()] == list(names)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.png": png()}, "no caption; pack a .txt, or a .json with 'text', beside it"),
        ({"0.png": b"", "0.txt": "x"}, "is no JPEG, PNG"),
        ({"0.png": png(), "0.txt": b"\xff"}, "'0.txt' is not UTF-8 text;"),
        ({"0.png": png(), "0.json": "{"}, "'0.json' is no valid JSON (Expecting"),
        ({"0.png": png(), "0.json": "[]"}, "'0.json' holds a list; expected one JSON object"),
        ({"0.png": png(), "0.json": '{"text": 3}'}, "text: got 3; expected a string"),
        ({"0.png": png(), "0.json": '{"text": "x", "text": "y"}'}, "'0.json': \"text\" stands there twice; remove one"),
        ({"0.png": png(), "0.txt": "a", "0.x.txt": "b"}, "'0' has 2 caption members (0.txt, 0.x.txt); keep one"),
        ({"0.png": png(), "0.seg.png": png(), "0.txt": "a"}, "'0' has 2 images (0.png, 0.seg.png); keep one"),
        ({"0.png": png(), "0.txt": "a\x1bb"}, "'0.txt' holds a control character; write"),
    ],
)
def test_members_that_cannot_be_used(here: Path, members: dict[str, bytes | str], message: str) -> None:
    write_tar(here / "00.tar", {"ok.png": png(), "ok.txt": "x"} | members)
    problem, cure = problems(here)
    assert problem.startswith(f"data/raw/00.tar::0.png: {message}")
    assert cure == "--skip-bad imports the others"


def test_links_in_a_tar_are_no_images(here: Path) -> None:
    path = write_tar(here / "00.tar", {"a.png": png(), "a.txt": "x"})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png"), (tarfile.REGTYPE, "a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert problems(here)[:3] == [
        "data/raw/00.tar::b.png: is a link or device, not an image; pack the files anew",
        "data/raw/00.tar::c.png: is a link or device, not an image; pack the files anew",
        "data/raw/00.tar::a.png: is in the file twice; pack the files anew",
    ]


# Refused: files


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["x"]}, (), "no column of embedded images, such as 'image' with bytes; it has text (string)"),
        ({"a": [b"x"], "b": [b"x"]}, (), "images in the columns a, b; choose one with --image-column"),
        ({"image": [b"x"]}, ("--image-column", "img"), "--image-column 'img' is no column of bytes of images; it has"),
        (
            {"image": [png()], "label": ["x"]},
            (),
            "no column 'text'; it has image (binary), label (string); choose the column of the captions with"
            " --caption-column, or import without captions: --no-captions",
        ),
    ],
)
def test_columns(here: Path, columns: dict[str, list[Any]], options: tuple[str, ...], message: str) -> None:
    write_parquet(here / "x.parquet", columns)
    (problem,) = problems(here, *options)
    assert problem.startswith(f"data/raw/x.parquet: {message}")


@pytest.mark.parametrize("options", [(), ("--image-column", "photo")])
def test_a_struct_of_bytes_is_preferred_where_it_is_named(here: Path, options: tuple[str, ...]) -> None:
    write_parquet(here / "x.parquet", {"hash": [b"x"], "photo": embedded(1), "text": ["x"]})
    if options:
        imported(here, *options)
        assert (MINE / "train/0.png").read_bytes() == png(0)
    else:
        assert problems(here) == [
            "data/raw/x.parquet: images in the columns hash, photo; choose one with --image-column"
        ]


def test_captions_that_are_no_utf8(here: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers())
    write_parquet(here / "x.parquet", {"image": embedded(2), "text": texts})
    assert problems(here) == ["data/raw/x.parquet: not UTF-8 text; write the file again with text as UTF-8"]


def test_all_broken_files_at_once(here: Path) -> None:
    write_files(here, "a.tar", "b.tar")
    write_tar(here / "c.tar", {"a.png": b"x" * 512, "b.png": b"x" * 512})
    (here / "c.tar").write_bytes((here / "c.tar").read_bytes()[: 1024 + 100])
    assert problems(here) == [
        "data/raw/a.tar: no .tar file, or a damaged one (empty file); restore it",
        "data/raw/b.tar: no .tar file, or a damaged one (empty file); restore it",
        "data/raw/c.tar: damaged or cut off after 1 members; restore it",
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda blob: b"<html>" * 200, "no .tar file, or a damaged one ("),
        (lambda blob: blob[:1000], "no .tar file, or a damaged one (unexpected end of data)"),
        (lambda blob: blob[: 1024 + 100], "damaged or cut off after 1 members"),  # in the second header
        (lambda blob: blob[: 2 * 1024], "damaged or cut off after 2 members"),  # before the end mark
        (lambda blob: blob[:1024] + b"x" * 512 + blob[1536:], "damaged or cut off after 1 members"),
        (
            lambda blob: blob + blob,
            "goes on behind its end mark, after 2 members, as .tar files do that were joined by",
        ),
    ],
    ids=["html", "data", "header", "end", "garbage", "joined"],
)
def test_damaged_tar(here: Path, spoil: Any, message: str) -> None:
    """Where ``tarfile``, and ``datasets`` with it, would take the first members for all of them."""
    path = write_tar(here / "00.tar", {"a.png": b"x" * 512, "b.png": b"x" * 512})
    path.write_bytes(spoil(path.read_bytes()))
    (problem,) = problems(here)
    assert problem.startswith(f"data/raw/00.tar: {message}")


def header(name: bytes, kind: bytes, size: int) -> bytes:
    """Of a .tar, with any size: tarfile writes no lies."""
    blob = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.GNU_FORMAT))
    blob[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    blob[148:157] = b" " * 8 + kind
    blob[148:156] = b"%06o\0 " % sum(blob)
    return bytes(blob)


@pytest.mark.parametrize(
    "first",
    [
        header(b"z.png", b"0", -512),
        header(b"z.png", b"0", -1024),
        header(b"long", b"L", -512),
        header(b"long", b"L", 2**62),
        header(b"pax", b"x", 2**45),
        header(b"z.png", b"0", 2**62),
        (header(b"long", b"L", 5) + b"abcd".ljust(512, b"\0")) * 3000,
    ],
    ids=["back", "same", "negative", "huge", "pax", "beyond", "headers of headers"],
)
def test_tar_with_sizes_that_cannot_be(here: Path, first: bytes) -> None:
    path = write_tar(here / "00.tar", {"a.png": b"x" * 512})
    path.write_bytes(first + path.read_bytes())
    (problem,) = problems(here)
    assert problem.startswith("data/raw/00.tar: ") and problem.endswith("; restore it") and "\n" not in problem


def test_two_kinds_of_files(here: Path) -> None:
    """``datasets`` would leave those of one kind out without a word."""
    write_files(here, "a.parquet", "b.tar", "c.tar")
    assert problems(here) == [
        "data/raw: holds Parquet and .tar files (a.parquet, b.tar); import each kind by itself, from a folder of"
        " its own or with --files"
    ]


def test_compressed_tar(here: Path) -> None:
    write_tar(here / "00.tar", {"a.png": png()}, "w:gz")
    assert problems(here) == ["data/raw/00.tar: compressed; unpack it first: gunzip"]


def test_damaged_parquet(here: Path) -> None:
    path = write_parquet(here / "a.parquet", {"image": embedded(2), "text": ["x", "y"]})
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    (problem,) = problems(here)
    assert problem.startswith("data/raw/a.parquet: no Parquet file, or a damaged one (Parquet magic bytes not found")
    path.write_bytes(b"PAR1" + b"\xff" * 100 + blob[104:])
    assert problems(here)[0].startswith("data/raw/a.parquet: no Parquet file, or a damaged one (")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.txt",), "data/raw: no Parquet, .tar or image files; found a.txt"),
        (("00.tar.gz",), "data/raw/00.tar.gz: compressed; unpack it first, and import or use what it holds"),
        (("images.zip",), "data/raw/images.zip: compressed; unpack it first, and import or use what it holds"),
        (("a.png", "a.txt"), "data/raw: a folder of images already; set dataset.source=data/raw instead"),
    ],
)
def test_sources_that_hold_nothing_to_import(here: Path, names: tuple[str, ...], message: str) -> None:
    write_files(here, *names)
    assert problems(here) == [message]


def test_a_source_that_is_not_there() -> None:
    assert problems("data/none/at/all") == [
        "data/none/at/all: no such file or folder; expected one, or a dataset of the Hugging Face Hub such as"
        " owner/name@COMMIT"
    ]


def test_a_folder_that_exists_is_left_alone(here: Path) -> None:
    write_shards(here, "tar")
    MINE.mkdir()
    for folder in (MINE, here / "inside"):
        args = commands.parse(["import", str(here), str(folder)])
        with pytest.raises(UserError) as caught:
            args.main(args)
        found = (
            "exists already; name a new folder" if folder == MINE else "is inside of data/raw; name a folder outside"
        )
        assert caught.value.problems[0].startswith(f"{folder}: {found}")
    assert not list(MINE.iterdir())


# A folder of images whose captions are in metadata.parquet


def test_metadata_in_parquet_becomes_lines(here: Path) -> None:
    write_files(here, "a.png", "sub/b.png")
    (here / "a.png").write_bytes(png(0))
    assert "metadata.parquet is not read by the stages; unpack it once: `lora-dag import data/raw data/mine`" in (
        refusal_of_folder(here)
    )
    imported(here)
    assert files() == ["a.png", "metadata.jsonl", "provenance.json", "sub/b.png"]
    assert captions(listed(MINE)) == {"a.png": ("x", "ünï/y"), "sub/b.png": ("z",)}
    assert (MINE / "a.png").read_bytes() == png(0)


def refusal_of_folder(here: Path) -> str:
    columns = {"file_name": ["a.png", "sub/b.png"], "text": [["x", "ünï/y"], ["z"]]}
    write_parquet(here / "metadata.parquet", columns)
    return refusal(here)


# Killed


KILLED = """
import os, sys
from pathlib import Path
from lora_dag import commands
from lora_dag.commands.import_dataset import image_folder
write, count = image_folder.write_once, 0
def killed(path, blob):
    global count
    count += 1
    if count == 30:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob[: len(blob) // 2])
        os.kill(os.getpid(), 9)
    write(path, blob)
image_folder.write_once = killed
args = commands.parse(["import", "data/raw", "data/mine"])
args.main(args)
"""


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_a_killed_import_goes_on(here: Path, suffix: str) -> None:
    if suffix == "parquet":
        write_parquet(here / "a.parquet", {"image": embedded(50), "text": [str(i) for i in range(50)]})
    else:
        members = {f"{i}.{kind}": blob for i in range(50) for kind, blob in (("png", png(i)), ("txt", str(i)))}
        write_tar(here / "a.tar", members)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = Path("data/mine.partial")
    assert not MINE.exists() and (partial / "images").is_dir()
    for folder in (partial, partial / "images"):
        assert refusal(folder).startswith(
            f"params.yaml dataset.source: '{folder}' is an import that did not finish; run the same `lora-dag import`"
        )
    written = sorted((partial / "images/train").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    times = {path.name: path.stat().st_mtime_ns for path in written}
    assert len(times) == 30
    imported(here)
    assert len(rows()) == 50 and not partial.exists()
    assert all((MINE / f"train/{i}.png").read_bytes() == png(i) for i in range(50))
    again = {name for name, at in times.items() if (MINE / "train" / name).stat().st_mtime_ns != at}
    assert again == {written[-1].name}  # the one that was cut


def test_what_an_import_with_other_options_left_is_removed(here: Path) -> None:
    write_shards(here, "tar")
    (Path("data/mine.partial") / "images/train").mkdir(parents=True)
    (Path("data/mine.partial") / UNFINISHED).write_text("")
    (Path("data/mine.partial") / "images/train/other.png").write_bytes(png(9))
    imported(here)
    assert "train/other.png" not in files()


def test_a_folder_in_the_way_is_left_alone(here: Path) -> None:
    write_shards(here, "tar")
    Path("data/mine.partial").mkdir()
    with pytest.raises(UserError, match="data/mine.partial: needed for the import, and exists without being one;"):
        imported(here)
    assert Path("data/mine.partial").is_dir()
