"""The stage as a whole; its parts have tests of their own: sources, metadata, inspection, split, page, ..."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag import commands
from lora_dag.artifacts import manifest as manifest_module
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core.console import Problem, UserError
from lora_dag.core.locks import writing
from tests.helpers.errors import assert_is, assert_line, codes_of, refused
from tests.helpers.sources import write_parquet, write_tar
from tests.helpers.workspace import Workspace, make_image, read_rows, write_rows

RAW = Path("data/raw")


def problems(workspace: Workspace, *argv: str) -> tuple[Problem, ...]:
    """The lines that prepare refuses the input with, having written nothing."""
    with pytest.raises(UserError) as caught:
        workspace.run("prepare", *argv)
    assert not (workspace.path / "data" / "prepared").exists()
    assert not (workspace.path / "reports").exists()
    return caught.value.problems


def prepared(workspace: Workspace, *argv: str) -> Manifest:
    workspace.run("prepare", *argv)
    return Manifest.load(workspace.path / "data" / "prepared")


def table() -> dict[str, dict[str, str]]:
    """reports/dataset/images.csv by file name."""
    rows = csv.DictReader(io.StringIO(Path("reports/dataset/images.csv").read_text(encoding="utf-8")))
    return {row["file_name"]: row for row in rows}


def test_outputs(workspace: Workspace) -> None:
    lines = workspace.run("prepare")
    manifest = Manifest.load(Path("data/prepared"))
    metrics = json.loads(Path("reports/dataset/metrics.json").read_text())
    assert [item.file_name for item in manifest.items] == [f"{index:02}.png" for index in range(8)]
    assert {item.split for item in manifest.items} == {"train", "heldout"}
    item = manifest.items[3]
    assert (item.caption, item.captions) == ("thing 3", ("thing 3",))
    assert (item.source_width, item.source_height, item.width, item.height) == (48, 48, 32, 32)
    assert (metrics["num_images"], metrics["num_unlisted"], metrics["num_left_out"]) == (8, 0, 0)
    assert metrics["num_train"] == sum(item.split == "train" for item in manifest.items)
    assert table().keys() == {item.file_name for item in manifest.items}
    assert lines[-1] == "next        python -m stages.cache_latents"
    with Image.open("reports/dataset/contact.png") as contact:
        assert contact.info == {}
    assert Path("reports/dataset/contact.png").stat().st_size <= 200_000


def test_same_input_same_bytes(workspace: Workspace) -> None:
    workspace.run("prepare")
    first = workspace.tree("data/prepared") | workspace.tree("reports")
    shutil.rmtree("data/prepared")
    shutil.rmtree("reports")
    os.utime(RAW / "00.png", (0, 0))
    workspace.run("prepare")
    remembered = workspace.tree("data/prepared") | workspace.tree("reports")
    shutil.rmtree(".state")
    workspace.run("prepare")
    assert workspace.tree("data/prepared") | workspace.tree("reports") == remembered == first


def test_more_images_move_none(workspace: Workspace, images: Callable[..., Path]) -> None:
    before = {item.file_name: item.split for item in prepared(workspace).items}
    images(workspace.path / RAW, 24)
    after = {item.file_name: item.split for item in prepared(workspace).items}
    assert len(after) == 24
    assert before.items() <= after.items()


def test_seed_changes_the_split(workspace: Workspace, images: Callable[..., Path]) -> None:
    images(workspace.path / RAW, 24)
    splits = {
        tuple(item.split for item in prepared(workspace, "--set", f"dataset.seed={seed}").items) for seed in (0, 1)
    }
    assert len(splits) == 2


def test_sizes_are_those_of_the_upright_image(workspace: Workspace) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(0, 60, 40).save(RAW / "02.png", exif=exif)
    item = prepared(workspace).items[2]
    assert (item.source_width, item.source_height) == (40, 60)


def test_only_images_with_transparent_pixels_depend_on_background_and_alpha(workspace: Workspace) -> None:
    for index, alpha in ((2, 255), (3, 254)):
        image = make_image(index)
        image.putalpha(alpha)
        image.save(RAW / f"{index:02}.png")
    plain, masked = prepared(workspace), prepared(workspace, "--set", "dataset.mask=alpha")
    assert [item.file_name for item in plain.items if item.transparent] == ["03.png"]
    assert [item.file_name for item in masked.items if item.mask == "alpha"] == ["03.png"]
    assert {item.mask for item in plain.items} == {None}


def test_empty_captions_are_counted(workspace: Workspace) -> None:
    rows = read_rows(RAW)
    rows[0]["text"] = ""
    write_rows(RAW, rows)
    assert_line("\n".join(workspace.run("prepare")), "caption-empty", "1 caption is empty and trains ")


# Every kind of source gives the same images and captions


def as_pairs() -> None:
    for row in read_rows(RAW):
        (RAW / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (RAW / "metadata.jsonl").unlink()


def as_csv() -> None:
    lines = [f'{row["file_name"]},"{row["text"]}"\n' for row in read_rows(RAW)]
    (RAW / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    (RAW / "metadata.jsonl").unlink()


def as_parquet() -> None:
    rows = read_rows(RAW)
    blobs = [(RAW / row["file_name"]).read_bytes() for row in rows]
    shutil.rmtree(RAW)
    images = [{"bytes": blob, "path": row["file_name"]} for blob, row in zip(blobs, rows, strict=True)]
    write_parquet(Path("data/shards/a.parquet"), {"image": images, "text": [row["text"] for row in rows]})
    import_shards()


def as_tar() -> None:
    members: dict[str, bytes | str] = {}
    for row in read_rows(RAW):
        members[row["file_name"]] = (RAW / row["file_name"]).read_bytes()
        members[row["file_name"].replace(".png", ".txt")] = row["text"]
    shutil.rmtree(RAW)
    write_tar(Path("data/shards/00.tar"), members)
    import_shards()


def import_shards() -> None:
    args = commands.parse(["import", "data/shards", str(RAW)])
    args.main(args)


@pytest.mark.parametrize("convert", [as_pairs, as_csv, as_parquet, as_tar])
def test_kinds_of_sources(workspace: Workspace, convert: Callable[[], None]) -> None:
    def content(manifest: Manifest) -> set[tuple[str, str, str]]:
        return {(item.sha256, item.caption, item.split) for item in manifest.items}

    before = prepared(workspace)
    workspace.run("cache_latents")
    convert()
    after = prepared(workspace)
    assert content(after) == content(before) and len(after.items) == 8
    assert [line for line in workspace.run("cache_latents") if "encoded" in line] == [
        "captions    encoded 0, reused 9",
        "images      encoded 0, reused 8",
    ]


def test_one_prompt_for_all(workspace: Workspace) -> None:
    (RAW / "metadata.jsonl").unlink()
    manifest = prepared(workspace, "--set", "dataset.instance_prompt=a photo of sks thing")
    assert {item.captions for item in manifest.items} == {("a photo of sks thing",)}


def test_subsets_with_their_own_settings(workspace: Workspace, images: Callable[..., Path]) -> None:
    for index in range(4):
        path = RAW / "reg" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        make_image(100 + index).save(path)
    (RAW / "mine").mkdir()
    for name in ("metadata.jsonl", *(row["file_name"] for row in read_rows(RAW))):
        os.rename(RAW / name, RAW / "mine" / name)
    subsets = (
        "[{path: mine, repeats: 3, caption_prefix: 'sks, '},"
        " {path: reg, instance_prompt: a thing, regularization: true, loss_weight: 0.5}]"
    )
    manifest = prepared(workspace, "--set", f"dataset.subsets={subsets}")
    mine, reg = manifest.items[:8], manifest.items[8:]
    assert {(item.repeats, item.loss_weight, item.regularization) for item in mine} == {(3, 1.0, False)}
    assert {(item.repeats, item.loss_weight, item.regularization, item.split) for item in reg} == {
        (1, 0.5, True, "train")
    }
    assert mine[3].caption == "sks, thing 3" and reg[0].caption == "a thing"


# What is refused, and what is left out


def test_background_is_a_color(workspace: Workspace) -> None:
    (problem,) = problems(workspace, "--set", "dataset.background=white")
    assert problem.startswith("--set dataset.background: ") and "'white'" in problem


def spoil_four() -> None:
    rows = read_rows(RAW)
    rows[1]["text"] = None
    rows[5]["file_name"] = "../x.png"
    write_rows(RAW, rows)
    (RAW / "03.png").write_bytes(b"")
    with open(RAW / "metadata.jsonl", "a") as file:
        file.write("{\n")


def test_all_problems_at_once_in_the_order_of_the_file(workspace: Workspace) -> None:
    spoil_four()
    found = [problem.split(": ")[0] for problem in problems(workspace)]
    assert found == [f"data/raw/metadata.jsonl:{number}" for number in (2, 4, 6, 9)]


def test_bad_images_are_left_out_and_listed(workspace: Workspace) -> None:
    spoil_four()
    argv = ("--set", "dataset.on_bad=skip", "--set", "dataset.max_bad_fraction=0.5")
    lines = "\n".join(workspace.run("prepare", *argv))
    names = [item.file_name for item in Manifest.load(Path("data/prepared")).items]
    assert names == ["00.png", "02.png", "04.png", "06.png", "07.png"]
    left_out = {name: row["reason"] for name, row in table().items() if row["split"] == "left out"}
    assert "data/raw/metadata.jsonl:4: '03.png'" in left_out["03.png"]
    assert "text: got null" in left_out["01.png"]
    assert "data/raw/metadata.jsonl:9" in left_out
    assert codes_of(lines).count("image-left-out") == 4
    assert_line(lines, "image-left-out", "data/raw/metadata.jsonl:4: '03.png'")
    assert json.loads(Path("reports/dataset/metrics.json").read_text())["num_left_out"] == 4


def test_the_reason_lists_all_problems_of_an_image(workspace: Workspace) -> None:
    Image.new("RGBA", (8, 8)).save(RAW / "03.png")
    argv = ("dataset.on_bad=skip", "dataset.max_bad_fraction=0.5", "dataset.mask=alpha")
    workspace.run("prepare", *(part for each in argv for part in ("--set", each)))
    reason = table()["03.png"]["reason"]
    assert reason.startswith("data/raw/metadata.jsonl:4: '03.png' has 8 x 8 pixels") and "4.0 times" in reason
    assert "'03.png' is fully transparent" in reason and reason.count("metadata.jsonl") == 1


def test_printed_problems_are_limited(workspace: Workspace) -> None:
    write_rows(RAW, [{"file_name": f"{index}.png", "text": "x"} for index in range(1000)])
    found = problems(workspace)
    assert len(found) == 101
    assert_is(found[-1], "more-problems", "data/raw/metadata.jsonl: 900 ")
    *skipped, last = problems(workspace, "--set", "dataset.on_bad=skip")
    assert len(skipped) == 101
    assert_is(last, "too-many-bad", "params.yaml dataset.max_bad_fraction: 1000 of 1000 images")


def test_too_many_bad_images_are_refused(workspace: Workspace) -> None:
    spoil_four()
    *rows, last = problems(workspace, "--set", "dataset.on_bad=skip", "--set", "dataset.max_bad_fraction=0.25")
    assert len(rows) == 4
    assert_is(last, "too-many-bad", "--set dataset.max_bad_fraction: 4 of 9 images", "0.25")


def test_the_command_refuses_in_one_line(workspace: Workspace) -> None:
    (RAW / "03.png").write_bytes(b"")
    result = workspace.process("prepare")
    assert result.returncode == 2
    assert codes_of(result.stderr) == ["image-empty"]
    assert_line(result.stderr, "image-empty", "error: data/raw/metadata.jsonl:4: '03.png'")


@pytest.mark.parametrize(
    ("source", "overlap"),
    [
        ("data", "contains data/prepared"),
        ("data/prepared", "'data/prepared' is a folder that a stage writes."),
        ("data/prepared/x", "inside of data/prepared"),
    ],
)
def test_a_source_that_overlaps_an_output_is_refused(workspace: Workspace, source: str, overlap: str) -> None:
    with refused("source-overlaps-output", f"--set dataset.source: '{source}'", overlap):
        workspace.run("prepare", "--set", f"dataset.source={source}")


def test_two_runs_do_not_mix_their_outputs(workspace: Workspace) -> None:
    with writing(Path("data/prepared")), pytest.raises(UserError) as caught:
        workspace.run("prepare")
    assert caught.value.problems[0].startswith(f"data/prepared: process {os.getpid()} ")


def test_a_run_that_cannot_write_leaves_the_last_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.run("prepare")
    before = workspace.tree("data/prepared")

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(manifest_module, "write_text", full)
    with pytest.raises(OSError):
        workspace.run("prepare", "--set", "dataset.seed=5", "--set", "dataset.crop=random")
    assert workspace.tree("data/prepared") == before


def test_captions_with_unusual_ends_of_lines(workspace: Workspace) -> None:
    rows = read_rows(RAW)
    rows[2]["text"] = "one\u2028two\x85three"
    write_rows(RAW, rows)
    assert prepared(workspace).items[2].caption == "one\u2028two\x85three"


@pytest.mark.parametrize(
    "change",
    [
        {"captions": "abc"},
        {"captions": []},
        {"caption": None},
        {"split": "foo"},
        {"width": "64"},
        {"width": 0},
        {"file_name": 5},
        {"file_name": "01.png"},
        {"repeats": 0},
        {"loss_weight": -1.0},
    ],
    ids=str,
)
def test_a_manifest_edited_by_hand(workspace: Workspace, change: dict[str, Any]) -> None:
    workspace.run("prepare")
    path = Path("data/prepared/manifest.jsonl")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    with pytest.raises(UserError) as caught:
        workspace.run("cache_latents")
    assert caught.value.problems[0].startswith("data/prepared/manifest.jsonl: edited by hand or of another version")
