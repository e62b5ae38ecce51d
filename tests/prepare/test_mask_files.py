"""Mask files: in a folder, or beside the images."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.errors import assert_are, assert_is
from tests.helpers.sources import listed, problems, refusal, write_files
from tests.helpers.workspace import write_rows


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
    assert_are(listing.problems, ("mask-missing", "data/raw/two/a.png: 'two/a.png'", "folder 'masks'"))
    assert listing.problems[0].file_name == "two/a.png"
    assert_are(listing.warnings, ("mask-without-image", "1 mask in data/raw/one"))


def test_masks_beside_metadata_are_no_images(here: Path) -> None:
    write_files(here, "a.png", "masks/a.png")
    write_rows(here, [{"file_name": "a.png", "text": "x"}])
    listing = listed(here, mask="masks")
    assert ([entry.mask for entry in listing.entries], listing.unlisted) == (["masks/a.png"], [])


def test_bad_masks(here: Path) -> None:
    write_files(here, "a.png", "b.png", "masks/a.png", "masks/a.jpg")
    (Path("data") / "secret.png").write_bytes(b"")
    (here / "masks/b.png").symlink_to("../../secret.png")
    first, second = problems(here, instance_prompt="x", mask="masks")
    assert_is(first, "mask-ambiguous", "data/raw/a.png: 'a.png'", "2 masks (masks/a.jpg, masks/a.png)")
    assert_is(second, "name-outside-source", "data/raw/b.png: 'masks/b.png'")


def test_mask_folder_missing_or_outside(here: Path) -> None:
    write_files(here, "a.png")
    problem = refusal(here, instance_prompt="x", mask="mask")
    assert_is(problem, "mask-folder-missing", "params.yaml dataset.mask: ", "data/raw", "'mask'", "null")
    (here / "link").symlink_to("../..")
    for mask in ("../m", "link"):
        problem = refusal(here, instance_prompt="x", mask=mask)
        assert_is(problem, "name-outside-source", f"params.yaml dataset.mask: '{mask}'")


def test_mask_folder_that_is_the_source(here: Path) -> None:
    write_files(here, "a.png", a="x")
    for mask in (".", "./"):
        assert_is(refusal(here, mask=mask), "mask-invalid", f"params.yaml dataset.mask: '{mask}'")


def test_masks_beside_images(here: Path) -> None:
    """OneTrainer uses the ending -masklabel."""
    write_files(here, "a.jpg", "a-masklabel.png", "sub/b.png", "c-masklabel.png")
    write_rows(here, [{"file_name": "a.jpg", "text": "x"}, {"file_name": "sub/b.png", "text": "x"}])
    listing = listed(here, mask="*-masklabel")
    assert [(entry.file_name, entry.mask) for entry in listing.entries] == [("a.jpg", "a-masklabel.png")]
    assert_are(listing.problems, ("mask-missing", "data/raw/metadata.jsonl:2: 'sub/b.png'", "'b-masklabel'"))
    assert listing.unlisted == []
    assert_are(listing.warnings, ("mask-without-image", "1 mask in data/raw"))
