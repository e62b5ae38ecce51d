"""Folders of images with .txt files beside them, or one prompt for all; warnings about unread files."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from tests.helpers.errors import assert_are, assert_is, invalid_setting
from tests.helpers.images import dataset
from tests.helpers.sources import captions, listed, problems, refusal, splits, write_files
from tests.helpers.workspace import write_rows


def test_text_files_beside_images(here: Path) -> None:
    write_files(here, "a.png", "b.JPG", "sub/c.webp", ".hidden.png", ".dvc/x.png", "LICENSE", "README.txt", "x.png.dvc")
    write_files(here, a="\ufeffa cat\r\n\r\n  a black cat \r\n", b="", orphan="x", **{"sub/c": "größer"})
    listing = listed(here)
    assert captions(listing) == {"a.png": ("a cat", "a black cat"), "b.JPG": ("",), "sub/c.webp": ("größer",)}
    assert listing.entries[0].place == "data/raw/a.png"
    assert listing.problems == []
    assert_are(
        listing.warnings,
        ("caption-without-image", "1 caption file in data/raw"),
        ("caption-lines", "data/raw", "1 image", "(a.png)"),
    )


def test_captions_named_like_licenses(here: Path) -> None:
    write_files(here, "license plate 1.png", "README.png", "notice.jpg", "LICENSE.txt", "LICENCE")
    write_files(here, **{"license plate 1": "a plate", "README": "a page", "notice": "a sign"})
    listing = listed(here)
    assert captions(listing) == {
        "README.png": ("a page",),
        "license plate 1.png": ("a plate",),
        "notice.jpg": ("a sign",),
    }
    assert (listing.problems, listing.warnings) == ([], [])


def test_files_of_unknown_suffix_are_warned_about(here: Path) -> None:
    write_files(here, "a.png", "c.mpo", "IMG_1.cr2", "sub/IMG_2.CR2", "without", "x.caption", a="x", c="y")
    write_files(here, "LICENSE", "README.md", "notes.md", "a.png.dvc", ".gitignore", ".DS_Store")
    listing = listed(here)
    assert sorted(captions(listing)) == ["a.png", "c.mpo"]
    assert_are(
        listing.warnings,
        ("caption-without-image", "1 caption file in data/raw"),
        ("file-not-image", "3 files", "data/raw", "(IMG_1.cr2, sub/IMG_2.CR2, without)"),
    )


def test_files_named_by_rows_are_not_warned_about(here: Path) -> None:
    write_files(here, "a.png", "without", "b.cr2")
    write_rows(here, [{"file_name": name, "text": "x"} for name in ("a.png", "without")])
    listing = listed(here)
    assert sorted(captions(listing)) == ["a.png", "without"]
    assert_are(listing.warnings, ("file-not-image", "1 file ", "data/raw", "(b.cr2)"))


def test_a_image_without_its_text_file(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="cat")
    (problem,) = problems(here)
    assert_is(problem, "caption-missing", "data/raw/b.png: 'b.png'", "b.txt", "dataset.instance_prompt")
    assert captions(listed(here)) == {"a.png": ("cat",)}


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (b"caf\xe9", ("not-utf8",)),
        ("a fox".encode("utf-16-le"), ("not-utf8", "UTF-16")),
        (b"a\0b c", ("caption-characters",)),
        (b"x" * (2**20 + 1), ("file-too-large", "1,048,577 bytes", "1,048,576")),
    ],
)
def test_bad_text_file(here: Path, blob: bytes, expected: tuple[str, ...]) -> None:
    write_files(here, "a.png", "b.png", a="cat")
    (here / "b.txt").write_bytes(blob)
    (problem,) = problems(here)
    assert_is(problem, *expected, "data/raw/b.png: 'b.txt'")


def test_text_files_are_opened_only_if_they_are_files(here: Path) -> None:
    write_files(here, "a.png", "b.png", "c.png", a="cat")
    os.mkfifo(here / "b.txt")
    (Path("data") / "secret.txt").write_text("secret")
    (here / "c.txt").symlink_to(Path("../secret.txt"))
    first, second = problems(here)
    assert_is(first, "file-not-regular", "data/raw/b.png: 'b.txt'")
    assert_is(second, "name-outside-source", "data/raw/c.png: 'c.txt'", "Put the file itself")


def test_instance_prompt_for_images_without_captions(here: Path) -> None:
    write_files(here, "b.png", "a/c.png")
    assert captions(listed(here, instance_prompt="sks dog")) == {"a/c.png": ("sks dog",), "b.png": ("sks dog",)}


def test_images_without_captions_show_all_three_ways(here: Path) -> None:
    write_files(here, "a.png")
    ways = ('{"file_name": "red-apple.png", "text": "red apple"}', "red-apple.txt", "dataset.instance_prompt")
    assert_is(refusal(here), "captions-missing", "data/raw: ", *ways)


def test_instance_prompt_beside_captions(here: Path) -> None:
    write_files(here, "a.png", a="cat")
    problem = refusal(here, instance_prompt="sks dog")
    assert_is(
        problem,
        "prompt-and-captions",
        "params.yaml dataset.instance_prompt: 'sks dog'",
        ".txt files of data/raw",
        "null",
    )
    write_rows(here, [{"file_name": "a.png", "text": "cat"}])
    subsets = [{"path": ".", "instance_prompt": "sks dog"}]
    problem = refusal(here, subsets=subsets)
    assert_is(
        problem,
        "prompt-and-captions",
        "params.yaml dataset.subsets.0.instance_prompt: 'sks dog'",
        "data/raw/metadata.jsonl",
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
    assert_is(refusal(here, instance_prompt="sks"), "prompt-and-captions", f"{suffix} files of data/raw")


def test_two_caption_files_of_one_image(here: Path) -> None:
    write_files(here, "a.png", a="x", **{"a.png": "y"})
    assert_are(problems(here), ("caption-ambiguous", "data/raw/a.png: 'a.png'", "(a.txt, a.png.txt)"))


def test_records_beside_images_are_read_as_in_tar_files(here: Path) -> None:
    """img2dataset and unpacked WebDataset shards have .jpg, .txt and .json files."""
    write_files(here, "a.png", "b.png", b="from text")
    for name in ("a", "b"):
        (here / f"{name}.json").write_text(json.dumps({"caption": f"from json {name}", "key": name, "split": "test"}))
    assert captions(listed(here, caption_column="caption")) == {
        "a.png": ("from json a",), "b.png": ("from json b",)
    }  # fmt: skip
    assert [entry.split for entry in listed(here, caption_column="caption").entries] == ["test", "test"]
    (here / "b.txt").unlink()
    found = ("2 .json files", "'text'", "caption, key, split: set dataset.caption_column")
    assert_is(refusal(here), "captions-missing", "data/raw: ", *found)
    assert captions(listed(here, instance_prompt="x")) == {"a.png": ("x",), "b.png": ("x",)}
    problem = refusal(here, instance_prompt="x", caption_column="caption")
    assert_is(problem, "prompt-and-captions", ".json files of data/raw")


def test_json_of_other_programs_is_ignored(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="x", b="y")
    (here / "a.json").write_text('["labels"]')
    (here / "b.json").write_text("{")
    listing = listed(here)
    assert captions(listing) == {"a.png": ("x",), "b.png": ("y",)}
    assert (listing.problems, listing.warnings) == ([], [])
    (here / "b.txt").unlink()
    assert_is(problems(here)[0], "json-invalid", "data/raw/b.png: 'b.json'")


@pytest.mark.parametrize("suffix", [".tags", ".cap", ".wd14"])
def test_files_that_may_hold_captions_are_named_with_the_cure(here: Path, suffix: str) -> None:
    write_files(here, "a.png", "b.png", f"a{suffix}", f"b{suffix}", "a.npz", "Thumbs.db")
    rename = f'for f in *{suffix}; do mv "$f" "${{f%{suffix}}}.txt"; done'
    assert_is(refusal(here), "captions-missing", "data/raw: ", f"2 {suffix} files (a{suffix})", rename)
    warnings = listed(here, instance_prompt="x").warnings
    assert_are(warnings, ("caption-file-unread", "2 files", "data/raw", f"(a{suffix}, b{suffix})", ".txt"))


@pytest.mark.parametrize("name", ["captions.csv", "metadata.tsv", "meta_cap.json", "prompts.txt", "train.jsonl"])
def test_tables_under_other_names(here: Path, name: str) -> None:
    write_files(here, "a.png", name)
    assert_is(refusal(here), "captions-missing", f"If {name} ", "metadata.jsonl or metadata.csv", "file_name")


def test_a_caption_file_in_another_case(here: Path) -> None:
    write_files(here, "Fox.png", "a.png", a="x", fox="y")
    assert_are(problems(here), ("caption-missing", "data/raw/Fox.png: 'Fox.png'", "fox.txt to Fox.txt"))


def test_captions_in_utf_16(here: Path) -> None:
    """Notepad and PowerShell of Windows write UTF-16."""
    write_files(here, "a.png", "b.png", b="x")
    (here / "a.txt").write_text("größer 大きい\n", encoding="utf-16")
    assert captions(listed(here))["a.png"] == ("größer 大きい",)


# Unicode forms


@pytest.mark.parametrize(("image", "text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_the_other_unicode_form(here: Path, image: str, text: str) -> None:
    on_disk = unicodedata.normalize(image, "Été/café.png")  # type: ignore[arg-type]
    write_files(here, on_disk)
    folder = (here / on_disk).parent
    other = unicodedata.normalize(text, "café")  # type: ignore[arg-type]
    (folder / f"{other}.txt").write_text("a café")
    for subset in (".", unicodedata.normalize(text, "Été")):  # type: ignore[arg-type]
        assert captions(listed(here, subsets=[{"path": subset}])) == {on_disk: ("a café",)}
    masks = folder / unicodedata.normalize(image, "Maskén")  # type: ignore[arg-type]
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


# Images of other tools


@pytest.mark.parametrize("ending", ["-masklabel", "_mask", "-mask", ".mask", "_Mask", " mask"])
def test_masks_beside_images_suggest_the_mask_setting(here: Path, ending: str) -> None:
    write_files(here, "a.jpg", "b.jpg", f"a{ending}.png", f"b{ending}.png")
    expected = (
        "side-images", "data/raw: 2 images", f"masks of other images (a{ending}.png, b{ending}.png)",
        f"dataset.mask to '*{ending}'",
    )  # fmt: skip
    assert_is(refusal(here, instance_prompt="a photo of sks dog"), *expected)
    listing = listed(here, instance_prompt="a photo of sks dog", mask=f"*{ending}")
    assert {entry.file_name: entry.mask for entry in listing.entries} == {
        "a.jpg": f"a{ending}.png", "b.jpg": f"b{ending}.png"
    }  # fmt: skip
    (here / "a.txt").write_text("x")
    (here / "b.txt").write_text("x")
    assert_is(refusal(here), *expected)


@pytest.mark.parametrize("folder", ["masks", "mask", "Masks", "alpha_mask"])
def test_a_folder_of_masks_suggests_the_mask_setting(here: Path, folder: str) -> None:
    write_files(here, "a.jpg", "sub/b.jpg", f"{folder}/a.png", f"{folder}/sub/b.png")
    problem = refusal(here, instance_prompt="x")
    names = f"({folder}/a.png, {folder}/sub/b.png)"
    assert_is(problem, "side-images", "data/raw: 2 images", f"masks of other images {names}", f"'{folder}'")
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
def test_side_images_of_other_tools_are_refused(here: Path, names: tuple[str, str]) -> None:
    write_files(here, "a.jpg", "b.jpg", *names)
    problem = refusal(here, instance_prompt="x")
    assert_is(problem, "side-images", "data/raw: 2 images", "control images", f"({names[0]}, {names[1]})")
    assert "dataset.mask" not in problem


def test_masks_in_a_sibling_folder_are_refused(here: Path) -> None:
    """No value of dataset.mask reads masks from a sibling folder, so the message suggests none."""
    write_files(here, "images/a.jpg", "masks/a.png")
    problem = refusal(here, instance_prompt="x")
    assert_is(problem, "side-images", "1 image", "masks of other images (masks/a.png)")
    assert "dataset.mask" not in problem


def test_masks_with_a_prefix_are_refused(here: Path) -> None:
    """No value of dataset.mask reads masks by a prefix, so the message suggests none."""
    write_files(here, "sub/a.jpg", "sub/mask_a.png", "b.jpg")
    problem = refusal(here, instance_prompt="x")
    assert_is(problem, "side-images", "data/raw: 1 image", "masks of other images (sub/mask_a.png)")
    assert "dataset.mask" not in problem


def test_images_with_such_names_and_captions_of_their_own(here: Path) -> None:
    write_files(here, "fox.png", "fox_mask.png", "masks/owl.png", "owl.png", "a.png", "a-pose.png", "b.png", "c.png")
    names = ("fox", "fox_mask", "masks/owl", "owl", "a", "a-pose", "b", "c")
    write_files(here, **dict.fromkeys(names, "x"))
    assert len(captions(listed(here))) == 8
    for name in ("fox_mask.png", "masks/owl.png"):
        (here / name).unlink()
    for name in names:
        (here / f"{name}.txt").unlink(missing_ok=True)
    assert len(captions(listed(here, instance_prompt="x"))) == 6  # one of five is no habit


def test_invalid_mask_settings() -> None:
    for value in ("*", "a*", "*-mask*", "*/mask"):
        with invalid_setting("mask-invalid", f"'{value}'", "*-masklabel"):
            dataset(mask=value)
