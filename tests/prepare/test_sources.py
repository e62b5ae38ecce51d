"""dataset.source: kinds of sources, subsets, refused sources, warnings about captions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from stages.prepare.sources import UNFINISHED
from tests.helpers.errors import assert_are, assert_is
from tests.helpers.sources import listed, refusal, write_files
from tests.helpers.workspace import write_rows

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


# Sources that are none


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("data/none", "`dvc pull`"),
        ("acme/icons@main", "`lora-dag import acme/icons@main data/mine`"),
        ("acme/icons", "`lora-dag import acme/icons data/mine`, then set dataset.source=data/mine"),
        (f"acme/icons@{'ab' * 20}", f"`lora-dag import acme/icons@{'ab' * 20} data/mine`"),
        ("https://huggingface.co/datasets/acme/icons", "`lora-dag import acme/icons data/mine`"),
    ],
)
def test_missing_source(here: Path, source: str, fix: str) -> None:
    assert_is(refusal(source), "source-missing", f"params.yaml dataset.source: '{source}'", fix)


def test_source_of_another_kind(here: Path) -> None:
    write_files(here, "a.zip", "b.md", "pin.yaml")
    start = "params.yaml dataset.source: "
    assert_is(refusal(here / "a.zip"), "source-not-folder", f"{start}'data/raw/a.zip'")
    command = "`lora-dag import OWNER/NAME@COMMIT data/mine`"
    assert_is(refusal(here / "pin.yaml"), "source-not-folder", f"{start}'data/raw/pin.yaml'", command)
    assert_is(refusal(here), "dataset-empty", "data/raw: ", "1 .md, 1 .yaml, 1 .zip")


@pytest.mark.parametrize("name", ["00.tar", "a.tar.gz", "a.parquet", "metadata.parquet"])
def test_files_of_many_images_are_imported_first(here: Path, name: str) -> None:
    write_files(here, name)
    fix = "`lora-dag import {} data/mine`, then set dataset.source=data/mine"
    assert_is(refusal(here), "source-not-imported", "data/raw: ", name, fix.format("data/raw"))
    path = f"data/raw/{name}"
    assert_is(refusal(path), "source-not-imported", f"params.yaml dataset.source: '{path}'", fix.format(path))
    problem = refusal(here, subsets=[{"path": name}])
    assert_is(problem, "source-not-folder", f"params.yaml dataset.subsets: path '{name}'", fix.format(path))
    write_files(here, "b.png")
    assert_is(refusal(here, instance_prompt="x"), "source-not-imported", name)
    write_rows(here, [{"file_name": "b.png", "text": "x"}])
    assert_are(listed(here).warnings, ("archive-ignored", "1 .parquet or .tar file in data/raw", "metadata.jsonl"))


def test_an_unfinished_import_is_refused(here: Path) -> None:
    write_files(here / "images", "a.png", a="x")
    write_files(here, UNFINISHED)
    for folder in (here, here / "images"):
        problem = refusal(folder)
        assert_is(problem, "import-unfinished", f"params.yaml dataset.source: '{folder}'", "`lora-dag import`")


def test_source_that_would_hang(here: Path) -> None:
    os.mkfifo("data/a.tar")
    assert_is(refusal("data/a.tar"), "source-missing", "params.yaml dataset.source: 'data/a.tar'")


def test_the_current_folder_as_source(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, "a.png", a="x")
    monkeypatch.chdir(here)
    assert [(entry.file_name, entry.place) for entry in listed(".").entries] == [("a.png", "a.png")]


# Subsets


def test_subsets_of_every_kind(here: Path) -> None:
    write_files(here / "mine", "a.png", a="cat")
    write_files(here / "class", "b.png")
    subsets = [
        {"path": "./mine/", "repeats": 3},
        {"path": "class", "instance_prompt": "a dog", "regularization": True},
    ]
    listing = listed(here, subsets=subsets)
    assert [(entry.file_name, entry.captions, entry.subset) for entry in listing.entries] == [
        ("mine/a.png", ("cat",), 0),
        ("class/b.png", ("a dog",), 1),
    ]


def test_subsets_that_overlap(here: Path) -> None:
    write_files(here, "ink/a.png", "ink/b.png", "c.png")
    subsets = [{"path": "."}, {"path": "ink"}]
    problem = refusal(here, subsets=subsets, instance_prompt="x")
    found = ("'.' and 'ink'", "2 images", "'ink/a.png'")
    assert_is(problem, "subsets-overlap", "params.yaml dataset.subsets: ", *found)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("../other", ("name-outside-source", "path '../other'")),
        ("/etc", ("name-outside-source", "path '/etc'")),
        ("none", ("folder-missing", "path 'none'")),
        ("link", ("name-outside-source", "path 'link'")),
        ("a\n", ("name-unsafe", 'path "a\\n"')),
    ],
)
def test_subset_that_leaves_the_source(here: Path, path: str, expected: tuple[str, ...]) -> None:
    write_files(here, "a.png", a="x")
    write_files(Path("data/other"), "a.png", a="x")
    (here / "link").symlink_to("../other")
    code, value = expected
    assert_is(refusal(here, subsets=[{"path": path}]), code, f"params.yaml dataset.subsets: {value}")


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
    assert listed(here, instance_prompt="x").warnings == []  # equal for all images
    write_files(here, "1_dog/b.png", "more/c.png")
    warnings = listed(here, instance_prompt="x").warnings
    fix = "[{path: 10_sks dog, repeats: 10}, {path: 1_dog, repeats: 1}, {path: more, repeats: 1}]."
    assert_are(warnings, ("folder-repeats-ignored", "'10_sks dog'", fix))


# Warnings about captions


def test_captions_without_tags_are_warned_about(here: Path) -> None:
    write_files(here, "a.png", "b.png", "c.png", a=", ,", b="one, two", c="")
    assert_are(listed(here).warnings, ("caption-without-tags", "1 caption", "','"))
    varied = {"shuffle_tags": True, "num_caption_variants": 4}
    for keep_tags in (1, 2):
        assert_are(
            listed(here, **varied, keep_tags=keep_tags).warnings,
            ("caption-without-tags", "1 caption"),
            (
                "setting-ignored", "params.yaml dataset.shuffle_tags: ", "2 of 2 captions",
                f"fewer than {keep_tags + 2} tags", f"keep_tags is {keep_tags}",
            ),
        )  # fmt: skip


def test_empty_variants_are_warned_about(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="one", b="one, two, three, four, five, six, seven, eight, nine")
    changes = {"tag_dropout": 0.5, "num_caption_variants": 8}
    (warning,) = listed(here, **changes).warnings
    assert_is(warning, "caption-variant-empty", "1 caption", "dataset.tag_dropout 0.5", "dataset.keep_tags 0")
    assert 0 < int(warning.split()[0]) < 8
    assert listed(here, **changes, keep_tags=1).warnings == []
    assert listed(here, **changes, caption_prefix="sks").warnings == []
