"""dataset.source: its kinds, its subsets, what is none, and what is said of its captions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_dag.core.console import UserError
from stages.prepare.sources import UNFINISHED
from tests.conftest import write_rows
from tests.helpers.sources import listed, refusal, write_files

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
    ("source", "message"),
    [
        ("data/none", "'data/none' is no folder; `dvc pull` brings tracked data, or name a folder of your own"),
        ("acme/icons@main", "unpack it once: `lora-dag import acme/icons@main data/mine`"),
        ("acme/icons", "unpack it once: `lora-dag import acme/icons data/mine`, and set dataset.source=data/mine"),
        (f"acme/icons@{'ab' * 20}", f"unpack it once: `lora-dag import acme/icons@{'ab' * 20} data/mine`"),
        ("https://huggingface.co/datasets/acme/icons", "unpack it once: `lora-dag import acme/icons data/mine`"),
    ],
)
def test_missing_source(here: Path, source: str, message: str) -> None:
    problem = refusal(source)
    assert problem.startswith(f"params.yaml dataset.source: '{source}' is no folder; ")
    assert message in problem


def test_source_of_another_kind(here: Path) -> None:
    write_files(here, "a.zip", "b.md", "pin.yaml")
    start = "params.yaml dataset.source: "
    assert refusal(here / "a.zip") == f"{start}'data/raw/a.zip' is a file; name a folder"
    assert refusal(here / "pin.yaml") == (
        f"{start}'data/raw/pin.yaml' is a file; name a folder; of a Hub dataset, unpack it once: `lora-dag import"
        " OWNER/NAME@COMMIT data/mine`, and set dataset.source=data/mine"
    )
    assert refusal(here) == (
        "data/raw: no pictures and no metadata.jsonl; the dataset is empty (found 1 .md, 1 .yaml, 1 .zip)"
    )


@pytest.mark.parametrize("name", ["00.tar", "a.tar.gz", "a.parquet", "metadata.parquet"])
def test_files_of_many_pictures_are_imported_first(here: Path, name: str) -> None:
    write_files(here, name)
    cure = "unpack it once: `lora-dag import {} data/mine`, and set dataset.source=data/mine"
    assert refusal(here) == f"data/raw: {name} is not read by the stages; {cure.format('data/raw')}"
    path = f"data/raw/{name}"
    assert refusal(path) == (f"params.yaml dataset.source: '{path}' is a file of many pictures; {cure.format(path)}")
    assert refusal(here, subsets=[{"path": name}]) == (
        f"params.yaml dataset.subsets: path '{name}' is a file; {cure.format(path)}"
    )
    write_files(here, "b.png")
    assert "is not read by the stages" in refusal(here, instance_prompt="x")
    write_rows(here, [{"file_name": "b.png", "text": "x"}])
    assert listed(here).warnings == ["1 .parquet or .tar file in data/raw is not read beside metadata.jsonl"]


def test_an_import_that_did_not_finish_is_no_source(here: Path) -> None:
    write_files(here / "images", "a.png", a="x")
    write_files(here, UNFINISHED)
    for folder in (here, here / "images"):
        assert refusal(folder) == (
            f"params.yaml dataset.source: '{folder}' is an import that did not finish; run the same `lora-dag import`"
            " again, which goes on, and name the folder that it makes"
        )


def test_source_that_would_hang(here: Path) -> None:
    os.mkfifo("data/a.tar")
    assert refusal("data/a.tar").startswith("params.yaml dataset.source: 'data/a.tar' is no folder; ")


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
    assert refusal(here, subsets=subsets, instance_prompt="x") == (
        "params.yaml dataset.subsets: '.' and 'ink' both list 2 pictures, such as 'ink/a.png';"
        " choose paths that do not overlap, and use repeats to show pictures more often"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../other", "path '../other' leaves data/raw; expected a name relative to that folder"),
        ("/etc", "path '/etc' leaves data/raw; expected a name relative to that folder"),
        ("none", "path 'none' is not in data/raw; add it or correct the path"),
        ("link", "path 'link' is a link that leaves data/raw; put the pictures themselves there"),
        ("a\n", 'path "a\\n" holds a control character; rename the file'),
    ],
)
def test_subset_that_leaves_the_source(here: Path, path: str, message: str) -> None:
    write_files(here, "a.png", a="x")
    write_files(Path("data/other"), "a.png", a="x")
    (here / "link").symlink_to("../other")
    assert refusal(here, subsets=[{"path": path}]) == f"params.yaml dataset.subsets: {message}"


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


# What is said of captions


def test_captions_that_are_no_captions_are_told(here: Path) -> None:
    write_files(here, "a.png", "b.png", "c.png", a=", ,", b="one, two", c="")
    assert listed(here).warnings == ["1 caption holds nothing but commas"]
    varied = {"shuffle_tags": True, "num_caption_variants": 4}
    few = "which have fewer than {} tags (dataset.keep_tags keeps {}); tags are separated by ','"
    for kept in (1, 2):
        assert listed(here, **varied, keep_tags=kept).warnings == [
            "1 caption holds nothing but commas",
            f"dataset.shuffle_tags moves nothing in 2 of 2 captions, {few.format(kept + 2, kept)}",
        ]


def test_variants_without_a_tag_are_told(here: Path) -> None:
    write_files(here, "a.png", "b.png", a="one", b="one, two, three, four, five, six, seven, eight, nine")
    changes = {"tag_dropout": 0.5, "num_caption_variants": 8}
    (warning,) = listed(here, **changes).warnings
    assert warning.endswith(
        " variants have no tag left (of 1 caption) and will be learned without a prompt; lower dataset.tag_dropout 0.5,"
        " or raise dataset.keep_tags 0"
    )
    assert 0 < int(warning.split()[0]) < 8
    assert listed(here, **changes, keep_tags=1).warnings == []
    assert listed(here, **changes, caption_prefix="sks").warnings == []
