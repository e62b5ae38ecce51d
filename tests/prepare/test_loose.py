"""Folders of pictures with .txt files beside them, or one prompt for all; what is left out is told."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from tests.conftest import write_rows
from tests.helpers.images import dataset
from tests.helpers.sources import captions, listed, others, problems, refusal, splits, write_files


def test_text_files_beside_pictures(here: Path) -> None:
    write_files(here, "a.png", "b.JPG", "sub/c.webp", ".hidden.png", ".dvc/x.png", "LICENSE", "README.txt", "x.png.dvc")
    write_files(here, a="\ufeffa cat\r\n\r\n  a black cat \r\n", b="", orphan="x", **{"sub/c": "größer"})
    listing = listed(here)
    assert captions(listing) == {"a.png": ("a cat", "a black cat"), "b.JPG": ("",), "sub/c.webp": ("größer",)}
    assert listing.entries[0].place == "data/raw/a.png"
    assert listing.problems == []
    assert listing.warnings == [
        "1 caption file in data/raw belongs to no picture and is left out",
        "1 picture has another number of captions than others in data/raw (a.png): each line of a caption file is one,"
        " so put a caption that goes over several lines on one",
    ]


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
    assert listing.warnings == [
        "1 caption file in data/raw belongs to no picture and is left out",
        others(3, "IMG_1.cr2, sub/IMG_2.CR2, without"),
    ]


def test_files_that_rows_name_are_not_told_as_others(here: Path) -> None:
    write_files(here, "a.png", "without", "b.cr2")
    write_rows(here, [{"file_name": name, "text": "x"} for name in ("a.png", "without")])
    listing = listed(here)
    assert sorted(captions(listing)) == ["a.png", "without"]
    assert listing.warnings == [others(1, "b.cr2")]


def test_a_picture_without_its_text_file(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="cat")
    assert problems(here) == [
        "data/raw/b.png: 'b.png' has no caption; write b.txt beside it, or remove every caption file and set"
        " dataset.instance_prompt to one caption for all"
    ]
    assert captions(listed(here)) == {"a.png": ("cat",)}


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"caf\xe9", "'b.txt' is not UTF-8 text; save it as UTF-8"),
        ("a fox".encode("utf-16-le"), "'b.txt' seems to be UTF-16 text without its mark; save it as UTF-8"),
        (b"a\0b c", "'b.txt' holds a control character; write the caption as plain text"),
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


# Other tools' captions


@pytest.mark.parametrize("ending", [".txt", ".caption", ".png.txt", ".png.caption", ".CAPTION"])
def test_caption_files_of_other_trainers(here: Path, ending: str) -> None:
    write_files(here, "a.png", "sub/b.png")
    for name in ("a", "sub/b"):
        (here / f"{name}{ending}").write_text("a fox")
    listing = listed(here)
    assert captions(listing) == {"a.png": ("a fox",), "sub/b.png": ("a fox",)}
    assert (listing.problems, listing.warnings) == ([], [])
    suffix = Path(f"a{ending}").suffix.lower()
    assert f"would replace the captions in the {suffix} files of data/raw" in refusal(here, instance_prompt="sks")


def test_two_caption_files_of_one_picture(here: Path) -> None:
    write_files(here, "a.png", a="x", **{"a.png": "y"})
    assert problems(here) == ["data/raw/a.png: 'a.png' has 2 caption files (a.txt, a.png.txt); keep one"]


def test_records_beside_pictures_are_read_as_in_tar_files(here: Path) -> None:
    """As img2dataset writes them: .jpg, .txt and .json; or WebDataset shards that were unpacked."""
    write_files(here, "a.png", "b.png", b="from text")
    for name in ("a", "b"):
        (here / f"{name}.json").write_text(json.dumps({"caption": f"from json {name}", "key": name, "split": "test"}))
    assert captions(listed(here, caption_column="caption")) == {
        "a.png": ("from json a",), "b.png": ("from json b",)
    }  # fmt: skip
    assert [entry.split for entry in listed(here, caption_column="caption").entries] == ["test", "test"]
    (here / "b.txt").unlink()
    assert refusal(here).startswith(
        "data/raw: pictures without captions; 2 .json files beside them have no 'text' but caption, key, split: set"
        " dataset.caption_column; write metadata.jsonl"
    )
    assert captions(listed(here, instance_prompt="x")) == {"a.png": ("x",), "b.png": ("x",)}
    assert "would replace the captions in the .json files of data/raw" in refusal(
        here, instance_prompt="x", caption_column="caption"
    )


def test_json_of_other_programs_is_no_caption(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="x", b="y")
    (here / "a.json").write_text('["labels"]')
    (here / "b.json").write_text("{")
    listing = listed(here)
    assert captions(listing) == {"a.png": ("x",), "b.png": ("y",)}
    assert (listing.problems, listing.warnings) == ([], [])
    (here / "b.txt").unlink()
    assert problems(here)[0].startswith("data/raw/b.png: 'b.json' is no valid JSON (")


@pytest.mark.parametrize("suffix", [".tags", ".cap", ".wd14"])
def test_files_that_may_hold_captions_are_named_with_the_cure(here: Path, suffix: str) -> None:
    write_files(here, "a.png", "b.png", f"a{suffix}", f"b{suffix}", "a.npz", "Thumbs.db")
    assert refusal(here).startswith(
        f"data/raw: pictures without captions; 2 {suffix} files lie beside them (a{suffix}): if these hold captions,"
        f' rename them to .txt (for f in *{suffix}; do mv "$f" "${{f%{suffix}}}.txt"; done); write metadata.jsonl'
    )
    assert listed(here, instance_prompt="x").warnings == [
        f"2 files beside pictures of data/raw are not read (a{suffix}, b{suffix}); captions are read from .txt"
    ]


@pytest.mark.parametrize("name", ["captions.csv", "metadata.tsv", "meta_cap.json", "prompts.txt", "train.jsonl"])
def test_tables_under_other_names(here: Path, name: str) -> None:
    write_files(here, "a.png", name)
    assert refusal(here).startswith(
        f"data/raw: pictures without captions; {name} is not read under that name: make it metadata.jsonl or"
        " metadata.csv, with a column file_name; write metadata.jsonl"
    )


def test_a_caption_file_in_another_case(here: Path) -> None:
    write_files(here, "Fox.png", "a.png", a="x", fox="y")
    assert problems(here) == ["data/raw/Fox.png: 'Fox.png' has no caption; rename fox.txt to Fox.txt"]


def test_captions_in_utf_16(here: Path) -> None:
    """As Windows' Notepad and PowerShell write them."""
    write_files(here, "a.png", "b.png", b="x")
    (here / "a.txt").write_text("größer 大きい\n", encoding="utf-16")
    assert captions(listed(here))["a.png"] == ("größer 大きい",)


# Unicode forms


@pytest.mark.parametrize(("picture", "text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_the_other_unicode_form(here: Path, picture: str, text: str) -> None:
    on_disk = unicodedata.normalize(picture, "Été/café.png")  # type: ignore[arg-type]
    write_files(here, on_disk)
    folder = (here / on_disk).parent
    other = unicodedata.normalize(text, "café")  # type: ignore[arg-type]
    (folder / f"{other}.txt").write_text("a café")
    for subset in (".", unicodedata.normalize(text, "Été")):  # type: ignore[arg-type]
        assert captions(listed(here, subsets=[{"path": subset}])) == {on_disk: ("a café",)}
    masks = folder / unicodedata.normalize(picture, "Maskén")  # type: ignore[arg-type]
    write_files(masks, f"{other}.png")
    mask = unicodedata.normalize(text, "Maskén")  # type: ignore[arg-type]
    (entry,) = listed(here, subsets=[{"path": "Été"}], mask=mask).entries
    assert entry.mask is not None and (here / entry.mask).exists()


def test_a_named_split_in_the_other_unicode_form(here: Path) -> None:
    test, train = (unicodedata.normalize("NFD", name) for name in ("prüfung", "übung"))
    write_files(here, f"{test}/a.png", f"{train}/b.png")
    heldout = unicodedata.normalize("NFC", "prüfung")
    listing = listed(here, instance_prompt="x", heldout_fraction=None, heldout_split=heldout)
    assert splits(listing) == {f"{test}/a.png": heldout, f"{train}/b.png": unicodedata.normalize("NFC", "übung")}


def test_rows_with_another_form_for_folder_and_file(here: Path) -> None:
    on_disk = unicodedata.normalize("NFD", "Été") + "/" + unicodedata.normalize("NFC", "café.png")
    write_files(here, on_disk)
    write_rows(here, [{"file_name": unicodedata.normalize("NFC", "Été/café.png"), "text": "x"}])
    listing = listed(here)
    assert (captions(listing), listing.problems) == ({on_disk: ("x",)}, [])


# Pictures of other tools


@pytest.mark.parametrize("ending", ["-masklabel", "_mask", "-mask", ".mask", "_Mask", " mask"])
def test_masks_beside_pictures_are_refused_with_the_setting_that_reads_them(here: Path, ending: str) -> None:
    write_files(here, "a.jpg", "b.jpg", f"a{ending}.png", f"b{ending}.png")
    expected = (
        f"data/raw: 2 pictures look like masks of others (a{ending}.png, b{ending}.png); set dataset.mask to"
        f" '*{ending}', or move them out of it; to train on them, write a caption for each"
    )
    assert refusal(here, instance_prompt="a photo of sks dog") == expected
    listing = listed(here, instance_prompt="a photo of sks dog", mask=f"*{ending}")
    assert {entry.file_name: entry.mask for entry in listing.entries} == {
        "a.jpg": f"a{ending}.png", "b.jpg": f"b{ending}.png"
    }  # fmt: skip
    (here / "a.txt").write_text("x")
    (here / "b.txt").write_text("x")
    assert refusal(here) == expected


@pytest.mark.parametrize("folder", ["masks", "mask", "Masks", "alpha_mask"])
def test_a_folder_of_masks_that_no_setting_names(here: Path, folder: str) -> None:
    write_files(here, "a.jpg", "sub/b.jpg", f"{folder}/a.png", f"{folder}/sub/b.png")
    assert refusal(here, instance_prompt="x").startswith(
        f"data/raw: 2 pictures look like masks of others ({folder}/a.png, {folder}/sub/b.png); set dataset.mask to"
        f" '{folder}', or move"
    )
    assert len(listed(here, instance_prompt="x", mask=folder).entries) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("a_depth.png", "b_depth.png"),
        ("a-canny.png", "b-canny.png"),
        ("conditioning_images/a.png", "conditioning_images/b.png"),
        ("thumbnails/a.png", "thumbnails/b.png"),
        ("a.thumb.jpg", "b.thumb.jpg"),
        ("a-condlabel.png", "b-condlabel.png"),
        ("depth_a.png", "depth_b.png"),
        ("Canny-a.png", "Canny-b.png"),
    ],
)
def test_side_pictures_of_other_tools_are_refused(here: Path, names: tuple[str, str]) -> None:
    write_files(here, "a.jpg", "b.jpg", *names)
    assert refusal(here, instance_prompt="x") == (
        "data/raw: 2 pictures look like side pictures, such as control pictures or thumbnails, of others"
        f" ({names[0]}, {names[1]}); move them out of it; to train on them, write a caption for each"
    )


def test_masks_in_a_folder_beside_that_of_the_pictures(here: Path) -> None:
    """No value of dataset.mask reads them from there, so none is named."""
    write_files(here, "images/a.jpg", "masks/a.png")
    found = refusal(here, instance_prompt="x")
    assert "1 picture looks like masks of others (masks/a.png); move them out of it" in found


def test_masks_whose_names_begin_with_the_word(here: Path) -> None:
    """No value of dataset.mask reads them, so none is named."""
    write_files(here, "sub/a.jpg", "sub/mask_a.png", "b.jpg")
    assert refusal(here, instance_prompt="x").startswith(
        "data/raw: 1 picture looks like masks of others (sub/mask_a.png); move them out of it; to train"
    )


def test_pictures_with_such_names_and_captions_of_their_own(here: Path) -> None:
    write_files(here, "fox.png", "fox_mask.png", "masks/owl.png", "owl.png", "a.png", "a-pose.png", "b.png", "c.png")
    names = ("fox", "fox_mask", "masks/owl", "owl", "a", "a-pose", "b", "c")
    write_files(here, **dict.fromkeys(names, "x"))
    assert len(captions(listed(here))) == 8
    for name in ("fox_mask.png", "masks/owl.png"):
        (here / name).unlink()
    for name in names:
        (here / f"{name}.txt").unlink(missing_ok=True)
    assert len(captions(listed(here, instance_prompt="x"))) == 6  # one of five is no habit


def test_endings_of_masks() -> None:
    for value in ("*", "a*", "*-mask*", "*/mask"):
        with pytest.raises(ValueError, match=re.escape(f"'{value}' is neither a folder nor an ending")):
            dataset(mask=value)
