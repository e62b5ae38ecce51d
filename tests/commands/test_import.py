"""`lora-dag import`: from Parquet, WebDataset and Hub datasets to a folder of images."""

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
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_file
from stages.prepare.file_names import printable
from stages.prepare.sources import UNFINISHED
from tests.helpers.errors import assert_are, assert_is, assert_line, codes_of, refused
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
from tests.helpers.workspace import REPOSITORY, make_image

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


def problems(source: Path | str, *options: str) -> list[Problem]:
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


def test_missing_mask_column(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(1), "text": ["one"]})
    (problem,) = problems(here, "--mask-column", "nope")
    assert_is(problem, "column-missing", "data/raw/a.parquet: ", "--mask-column 'nope'", "image (", "text (string)")


def test_a_member_that_is_a_folder_of_another(here: Path) -> None:
    write_tar(here / "a.tar", {"a.png": png(0), "a.txt": "one", "a.png/b.png": png(1), "a.png/b.txt": "two"})
    assert "names-clash" in {problem.code for problem in problems(here)}


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_without_a_name(here: Path, folder: str) -> None:
    write_shards(here, "tar")
    args = commands.parse(["import", str(here), folder])
    with pytest.raises(UserError) as caught:
        args.main(args)
    assert caught.value.codes in (("folder-without-name",), ("folder-in-source",))


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
    assert_is(problem, "config-needed", "data/raw: ", "--config", "one", "two")
    imported(here, "--config", "two")
    assert rows("two") == [{"file_name": "0.png", "text": "y"}]


def test_a_split_column_decides_row_by_row(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(3), "text": ["x", "y", "z"], "split": ["test", "train", None]})
    imported(here)
    assert [[row["text"] for row in rows(split)] for split in ("test", "train")] == [["x"], ["y", "z"]]


def test_numbers_in_a_split_column_are_ignored(here: Path) -> None:
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
    assert any("dataset.instance_prompt" in line for line in caplog.messages)


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
    make_image(0).save(jpeg, format="JPEG")
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
    assert_are(
        problems(here),
        ("names-clash", "data/raw/b.parquet row 0: '0.png'", "data/raw/a.parquet row 0", "--number"),
        ("bad-samples", "data/raw: 1 sample ", "--skip-bad"),
    )
    imported(here, "--number")
    assert [row["file_name"] for row in rows()] == ["a-000000.png", "b-000000.png"]


def test_names_that_differ_only_in_case(here: Path) -> None:
    write_tar(here / "a.tar", {"a.png": png(), "a.txt": "x", "A.png": png(1), "A.txt": "y"})
    names = ("'train/A.png'", "'train/a.png' (data/raw/a.tar::a.png)")
    assert_is(problems(here)[0], "names-clash", "data/raw/a.tar::A.png: ", *names, "--number")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../a.png", ("name-outside-source", "'../a.png'", "data/mine")),
        ("/etc/a.png", ("name-outside-source", "'/etc/a.png'")),
        ("sub/../../a.png", ("name-outside-source", "'sub/../../a.png'")),
        ("a\n.png", ("name-unsafe", '"a\\n.png"')),
        ("-rf.png", ("name-unsafe", "'-rf.png'")),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_unsafe_names(here: Path, suffix: str, name: str, expected: tuple[str, ...]) -> None:
    if suffix == "parquet":
        write_parquet(here / "x.parquet", {"image": [{"bytes": png(), "path": name}], "text": ["x"]})
    else:
        write_tar(here / "x.tar", {name: png(), name.replace(".png", ".txt"): "x"})
    place = "data/raw/x.parquet row 0" if suffix == "parquet" else f"data/raw/x.tar::{printable(name)}"
    assert_is(problems(here)[0], *expected, f"{place}: ", "--number")


def test_unsafe_splits(here: Path) -> None:
    write_parquet(here / "x.parquet", {"image": embedded(1), "text": ["x"], "split": ["../train"]})
    assert_is(problems(here)[0], "name-outside-source", "data/raw/x.parquet row 0: '../train'")


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
    assert_are(
        problems(here),
        ("caption-not-text", "data/raw/a.parquet row 1: text: got null"),
        ("image-not-embedded", "data/raw/a.parquet row 2: ", "'image'"),
        ("image-format-unsupported", "data/raw/a.parquet row 3: the image is not", "HTML"),
        ("caption-not-text", "data/raw/a.parquet row 4: text: got []"),
        ("bad-samples", "data/raw: 4 samples", "--skip-bad"),
    )


def test_bad_samples_can_be_left_out(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(here / "a.parquet", {"image": [*embedded(1), {"bytes": b"x", "path": "b.png"}], "text": ["x", "y"]})
    imported(here, "--skip-bad")
    assert [row["file_name"] for row in rows()] == ["0.png"]
    assert codes_of("\n".join(caplog.messages)) == ["image-format-unsupported", "bad-samples"]
    assert_line("\n".join(caplog.messages), "bad-samples", "1 sample is")
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
    ("members", "expected"),
    [
        ({"0.png": png()}, ("caption-missing", "'text'", "--caption-column", "--no-captions")),
        ({"0.png": b"", "0.txt": "x"}, ("image-format-unsupported",)),
        ({"0.png": png(), "0.txt": b"\xff"}, ("not-utf8", "'0.txt'")),
        ({"0.png": png(), "0.json": "{"}, ("json-invalid", "'0.json'", "(Expecting")),
        ({"0.png": png(), "0.json": "[]"}, ("json-not-object", "'0.json'", "list")),
        ({"0.png": png(), "0.json": '{"text": 3}'}, ("caption-not-text", "text: got 3")),
        ({"0.png": png(), "0.json": '{"text": "x", "text": "y"}'}, ("json-key-twice", "'0.json': ", '"text"')),
        ({"0.png": png(), "0.txt": "a", "0.x.txt": "b"}, ("sample-ambiguous", "'0'", "(0.txt, 0.x.txt)")),
        ({"0.png": png(), "0.seg.png": png(), "0.txt": "a"}, ("sample-ambiguous", "'0'", "(0.png, 0.seg.png)")),
        ({"0.png": png(), "0.txt": "a\x1bb"}, ("caption-characters", "'0.txt'")),
    ],
)
def test_unusable_members(here: Path, members: dict[str, bytes | str], expected: tuple[str, ...]) -> None:
    write_tar(here / "00.tar", {"ok.png": png(), "ok.txt": "x"} | members)
    problem, advice = problems(here)
    assert_is(problem, *expected, "data/raw/00.tar::0.png: ")
    assert_is(advice, "bad-samples", "--skip-bad")


def test_links_in_a_tar_are_no_images(here: Path) -> None:
    path = write_tar(here / "00.tar", {"a.png": png(), "a.txt": "x"})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png"), (tarfile.REGTYPE, "a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert_are(
        problems(here)[:3],
        ("member-not-regular", "data/raw/00.tar::b.png: "),
        ("member-not-regular", "data/raw/00.tar::c.png: "),
        ("member-twice", "data/raw/00.tar::a.png: "),
    )


# Refused: files


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"text": ["x"]}, (), ("column-missing", "'image'", "text (string)")),
        (
            {f"column{i}": ["x"] for i in range(20)},
            (),
            ("column-missing", "column0 (string)", "column7 (string) and 12 more"),
        ),
        ({"a": [b"x"], "b": [b"x"]}, (), ("column-ambiguous", "a, b", "--image-column")),
        ({"image": [b"x"]}, ("--image-column", "img"), ("column-missing", "--image-column 'img'", "image (binary)")),
        (
            {"image": [png()], "label": ["x"]},
            (),
            ("column-missing", "'text'", "image (binary), label (string)", "--caption-column", "--no-captions"),
        ),
    ],
)
def test_columns(
    here: Path, columns: dict[str, list[Any]], options: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    write_parquet(here / "x.parquet", columns)
    (problem,) = problems(here, *options)
    assert_is(problem, *expected, "data/raw/x.parquet: ")


@pytest.mark.parametrize("options", [(), ("--image-column", "photo")])
def test_ambiguous_image_columns(here: Path, options: tuple[str, ...]) -> None:
    write_parquet(here / "x.parquet", {"hash": [b"x"], "photo": embedded(1), "text": ["x"]})
    if options:
        imported(here, *options)
        assert (MINE / "train/0.png").read_bytes() == png(0)
    else:
        assert_are(problems(here), ("column-ambiguous", "data/raw/x.parquet: ", "hash, photo", "--image-column"))


def test_captions_that_are_not_utf8(here: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers())
    write_parquet(here / "x.parquet", {"image": embedded(2), "text": texts})
    assert_are(problems(here), ("not-utf8", "data/raw/x.parquet: "))


def test_all_broken_files_at_once(here: Path) -> None:
    write_files(here, "a.tar", "b.tar")
    write_tar(here / "c.tar", {"a.png": b"x" * 512, "b.png": b"x" * 512})
    (here / "c.tar").write_bytes((here / "c.tar").read_bytes()[: 1024 + 100])
    assert_are(
        problems(here),
        ("shard-damaged", "data/raw/a.tar: ", "(empty file)"),
        ("shard-damaged", "data/raw/b.tar: ", "(empty file)"),
        ("shard-damaged", "data/raw/c.tar: ", "after 1 members"),
    )


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda blob: b"<html>" * 200, ("shard-damaged",)),
        (lambda blob: blob[:1000], ("shard-damaged", "(unexpected end of data)")),
        (lambda blob: blob[: 1024 + 100], ("shard-damaged", "after 1 members")),  # in the second header
        (lambda blob: blob[: 2 * 1024], ("shard-damaged", "after 2 members")),  # before the end mark
        (lambda blob: blob[:1024] + b"x" * 512 + blob[1536:], ("shard-damaged", "after 1 members")),
        (lambda blob: blob + blob, ("shard-joined", "after 2 members", "tar --ignore-zeros")),
    ],
    ids=["html", "data", "header", "end", "garbage", "joined"],
)
def test_damaged_tar(here: Path, spoil: Any, expected: tuple[str, ...]) -> None:
    """``tarfile`` alone, and ``datasets`` with it, would silently import only the first members."""
    path = write_tar(here / "00.tar", {"a.png": b"x" * 512, "b.png": b"x" * 512})
    path.write_bytes(spoil(path.read_bytes()))
    (problem,) = problems(here)
    assert_is(problem, *expected, "data/raw/00.tar: ")


def header(name: bytes, kind: bytes, size: int) -> bytes:
    """Return a header of a .tar file with any size. ``tarfile`` itself writes only true sizes."""
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
    assert_is(problem, "shard-damaged", "data/raw/00.tar: ")


def test_two_kinds_of_files(here: Path) -> None:
    """``datasets`` would leave those of one kind out without a word."""
    write_files(here, "a.parquet", "b.tar", "c.tar")
    assert_are(problems(here), ("shards-mixed", "data/raw: ", "(a.parquet, b.tar)", "a folder of its own."))


def test_compressed_tar(here: Path) -> None:
    write_tar(here / "00.tar", {"a.png": png()}, "w:gz")
    assert_are(problems(here), ("archive-compressed", "data/raw/00.tar: ", "gunzip"))


def test_damaged_parquet(here: Path) -> None:
    path = write_parquet(here / "a.parquet", {"image": embedded(2), "text": ["x", "y"]})
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    (problem,) = problems(here)
    assert_is(problem, "shard-damaged", "data/raw/a.parquet: ", "(Parquet magic bytes not found")
    path.write_bytes(b"PAR1" + b"\xff" * 100 + blob[104:])
    assert_are(problems(here), ("shard-damaged", "data/raw/a.parquet: "))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.txt",), ("nothing-to-import", "data/raw: ", "found a.txt")),
        (("00.tar.gz",), ("archive-compressed", "data/raw/00.tar.gz: ")),
        (("images.zip",), ("archive-compressed", "data/raw/images.zip: ")),
        (("a.png", "a.txt"), ("import-unneeded", "data/raw: ", "dataset.source=data/raw")),
    ],
)
def test_sources_without_files_to_import(here: Path, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    write_files(here, *names)
    assert_are(problems(here), expected)


def test_missing_source() -> None:
    assert_are(problems("data/none/at/all"), ("source-missing", "data/none/at/all: ", "owner/name@COMMIT"))


def test_an_existing_folder_is_refused(here: Path) -> None:
    write_shards(here, "tar")
    MINE.mkdir()
    for folder in (MINE, here / "inside"):
        args = commands.parse(["import", str(here), str(folder)])
        with refused("folder-exists" if folder == MINE else "folder-in-source", f"{folder}: "):
            args.main(args)
    assert not list(MINE.iterdir())


@pytest.mark.parametrize("folder", ["lora_dag/mine", "stages/mine", "stages"])
def test_a_folder_inside_the_code_is_refused(here: Path, folder: str) -> None:
    write_shards(here, "tar")
    args = commands.parse(["import", str(here), folder])
    with refused("folder-in-code", f"{folder}: ", "data/mine"):
        args.main(args)
    assert not Path(folder.partition("/")[0]).exists()


def test_column_options_for_tar_files_are_refused(here: Path) -> None:
    write_shards(here, "tar")
    for option in ("--image-column", "--mask-column"):
        assert_are(problems(here, option, "jpg"), ("option-without-effect", f"{option} jpg"))


# Names of files and folders that other programs write


@pytest.mark.parametrize("suffix", ["PARQUET", "Parquet", "TAR"])
@pytest.mark.parametrize("is_file", [True, False])
def test_suffixes_of_shards_in_upper_case(here: Path, suffix: str, is_file: bool) -> None:
    write_shards(here, suffix.lower())
    for path in (here / "data").iterdir():
        path.rename(path.with_suffix(f".{suffix}"))
    imported(here / f"data/train-00000-of-00001.{suffix}" if is_file else here)
    assert [row["text"] for row in rows("train")] == ["one", "two"]


@pytest.mark.parametrize("folder", ["data/raw [v2]", "data/what?", "data/*", "data/a[0-9]*"])
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_source_folders_with_pattern_characters(folder: str, suffix: str) -> None:
    write_shards(Path(folder), suffix)
    imported(folder)
    assert [row["text"] for row in rows("train")] == ["one", "two"]
    assert len(rows("test")) == 2


def test_configs_of_a_source_folder_with_pattern_characters() -> None:
    folder = Path("data/raw [v2]")
    write_parquet(folder / "a.parquet", {"image": embedded(1), "text": ["x"]})
    data_files = "data_files:\n  - split: one\n    path: a.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: mine\n  {data_files}---\n")
    imported(folder, "--config", "mine")
    assert len(rows("one")) == 1


def test_target_folders_with_pattern_characters(here: Path) -> None:
    write_shards(here, "parquet")
    args = commands.parse(["import", str(here), "data/mine [v2]*"])
    args.main(args)
    assert len(captions(listed("data/mine [v2]*"))) == 4


def test_line_ends_in_captions(here: Path) -> None:
    texts = ["one\r\ntwo", "one\rtwo", "one\ntwo"]
    write_parquet(here / "a.parquet", {"image": embedded(3), "text": texts})
    imported(here)
    assert [row["text"] for row in rows()] == ["one\ntwo"] * 3


def test_a_split_named_masks_is_refused(here: Path) -> None:
    write_parquet(here / "a.parquet", {"image": embedded(2), "text": ["x", "y"], "split": ["train", "Masks"]})
    assert_is(problems(here)[0], "split-named-masks", "data/raw/a.parquet row 1: ", "'Masks'")


# A folder of images whose captions are in metadata.parquet


def test_metadata_in_parquet_becomes_lines(here: Path) -> None:
    write_files(here, "a.png", "sub/b.png")
    (here / "a.png").write_bytes(png(0))
    problem = refusal_of_folder(here)
    assert_is(problem, "source-not-imported", "metadata.parquet", "`lora-dag import data/raw data/mine`")
    imported(here)
    assert files() == ["a.png", "metadata.jsonl", "provenance.json", "sub/b.png"]
    assert captions(listed(MINE)) == {"a.png": ("x", "ünï/y"), "sub/b.png": ("z",)}
    assert (MINE / "a.png").read_bytes() == png(0)


def refusal_of_folder(here: Path) -> Problem:
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
def test_a_killed_import_resumes(here: Path, suffix: str) -> None:
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
        assert_is(refusal(folder), "import-unfinished", f"params.yaml dataset.source: '{folder}'")
    written = sorted((partial / "images/train").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    times = {path.name: path.stat().st_mtime_ns for path in written}
    assert len(times) == 30
    imported(here)
    assert len(rows()) == 50 and not partial.exists()
    assert all((MINE / f"train/{i}.png").read_bytes() == png(i) for i in range(50))
    again = {name for name, at in times.items() if (MINE / "train" / name).stat().st_mtime_ns != at}
    assert again == {written[-1].name}  # the one that was cut


def test_files_of_an_import_with_other_options_are_removed(here: Path) -> None:
    write_shards(here, "tar")
    (Path("data/mine.partial") / "images/train").mkdir(parents=True)
    (Path("data/mine.partial") / UNFINISHED).write_text("")
    (Path("data/mine.partial") / "images/train/other.png").write_bytes(png(9))
    imported(here)
    assert "train/other.png" not in files()


def test_an_existing_partial_folder_is_refused(here: Path) -> None:
    write_shards(here, "tar")
    Path("data/mine.partial").mkdir()
    with refused("folder-exists", "data/mine.partial: "):
        imported(here)
    assert Path("data/mine.partial").is_dir()
