"""The folder of masks beside the pictures."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import write_rows
from tests.helpers.sources import listed, problems, refusal, write_files


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
    assert listing.warnings == ["1 mask in data/raw/one belongs to no picture and is left out"]


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


def test_mask_folder_that_is_the_source(here: Path) -> None:
    write_files(here, "a.png", a="x")
    for mask in (".", "./"):
        assert refusal(here, mask=mask) == (
            f"params.yaml dataset.mask: '{mask}' is the folder of the pictures themselves; name a folder below it that"
            " holds the masks alone"
        )


def test_masks_beside_pictures(here: Path) -> None:
    """As OneTrainer names them."""
    write_files(here, "a.jpg", "a-masklabel.png", "sub/b.png", "c-masklabel.png")
    write_rows(here, [{"file_name": "a.jpg", "text": "x"}, {"file_name": "sub/b.png", "text": "x"}])
    listing = listed(here, mask="*-masklabel")
    assert [(entry.file_name, entry.mask) for entry in listing.entries] == [("a.jpg", "a-masklabel.png")]
    assert [str(problem) for problem in listing.problems] == [
        "data/raw/metadata.jsonl:2: 'sub/b.png' has no mask 'b-masklabel' beside it; add one, white all over for all"
        " of it"
    ]
    assert (listing.unlisted, listing.warnings) == ([], ["1 mask in data/raw belongs to no picture and is left out"])
