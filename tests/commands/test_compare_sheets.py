"""Images of a comparison: the joined sheet, its labels, and thumbnails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from lora_dag.artifacts import image_table
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.commands.compare import revision_report, sheets
from lora_dag.core.files import sha256_file, write_text
from lora_dag.pages.sheets import cut
from tests.helpers.compared import (
    COLORS,
    IMAGE_TABLE,
    Repository,
    change_lineage,
    commit,
    git,
    write_images,
    write_revision,
)


def write_squares(colors: dict[str, str], captions: dict[str, str]) -> None:
    """data/raw of squares, and its images.csv."""
    shutil.rmtree("data/raw", ignore_errors=True)
    Path("data/raw").mkdir(parents=True)
    rows = []
    for name, color in colors.items():
        Image.new("RGB", (64, 64), color).save(f"data/raw/{name}.png")
        sha256 = sha256_file(Path(f"data/raw/{name}.png"))
        rows.append({"file_name": f"{name}.png", "split": "train", "captions": captions[name], "sha256": sha256})
    image_table.save(IMAGE_TABLE, rows)


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True)


def num_pixels(path: Path, channel: int) -> int:
    """Pixels that are nearly pure red (0), green (1) or blue (2)."""
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    others = np.delete(pixels, channel, axis=-1)
    return int(((pixels[..., channel] > 240) & (others.max(-1) < 20)).sum())


def test_changes_of_the_dataset_are_listed_with_the_images_that_are_here(repository: Repository) -> None:
    """Removed ones from DVC's cache, by the commit's dvc.lock."""
    write_text(Path("params.yaml"), "lora:\n  rank: 8\ndataset:\n  source: data/raw\n")
    dvc("init", "--quiet")
    write_squares({"a": "#ff0000", "b": "#00ff00"}, {"a": "apple", "b": "boat"})
    dvc("add", "--quiet", "data/raw")
    digest = YAML(typ="safe").load(Path("data/raw.dvc"))["outs"][0]["md5"]
    lock = {"schema": "2.0", "stages": {"prepare": {"cmd": "x", "deps": [{"path": "data/raw", "md5": digest}]}}}
    Path("dvc.lock").write_text(json.dumps(lock))
    commit("Two images")
    write_squares({"b": "#00ff00", "c": "#0000ff"}, {"b": "blue boat", "c": "cat"})
    page = repository.run()
    assert "## Dataset\n\nFrom HEAD to workspace: 1 added, 1 removed, 1 recaptioned.\n\n**1 added**" in page
    assert "- `b.png`: `boat` → `blue boat`" in page and "![Thumbnails](dataset-workspace.png)\n\n## Samples" in page
    sheet = Path("compare/HEAD..workspace/dataset-workspace.png")
    assert all(num_pixels(sheet, channel) > 60 * 60 for channel in range(3))
    shutil.rmtree(".dvc/cache")
    repository.run()
    assert [num_pixels(sheet, channel) > 60 * 60 for channel in range(3)] == [False, True, True]


def test_no_sheet_where_no_image_is_here(repository: Repository) -> None:
    write_images({"a": "apple", "b": "boat"})
    commit("Two images")
    write_images({"b": "blue boat", "c": "cat"})
    assert "dataset-workspace.png" not in repository.run()
    assert not Path("compare/HEAD..workspace/dataset-workspace.png").exists()


def test_sheet_shows_both_bases_where_they_were_drawn_in_another_size(repository: Repository) -> None:
    change_lineage(sheet={"cell": 64, "image": [32, 32]})
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as image:
        rows = cut(image.convert("RGB"), 2, 4, 64)
    assert "#" + bytes(rows[0][2].getpixel((32, 32))).hex() == COLORS["base"]


def test_images_at_another_strength_are_labeled_with_it(repository: Repository) -> None:
    settings = load_lineage(Path("reports/validate/lineage.json"))["validate"]
    change_lineage(validate=settings | {"scales": [0.5, 0.8]})  # the sheet's last column, which was 1.0
    repository.run()
    page = Path("compare/HEAD..workspace/compare.html").read_text()
    assert "<figcaption><span>HEAD</span><span>workspace x 0.8</span></figcaption>" in page
    with Image.open("compare/HEAD..workspace/samples.png") as image:
        cell = cut(image.convert("RGB"), 2, 3, 64)[0][2]
    assert "#" + bytes(cell.getpixel((32, 32))).hex() == COLORS[8]


def test_sheet_shows_the_base_once_and_each_adapter(repository: Repository) -> None:
    repository.run("main", "clear-newt")
    with Image.open("compare/main..clear-newt/samples.png") as image:
        rows = cut(image.convert("RGB"), 2, 3, 64)
    seen = [["#" + bytes(cell.getpixel((32, 32))).hex() for cell in row] for row in rows]
    assert seen == [[COLORS["base"], COLORS[8], COLORS[16]]] * 2


def test_sheet_takes_the_prompts_that_both_have(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree", "blue boat"])
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as image:
        assert image.height < 150


def test_sheets_without_a_common_prompt(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree"])
    assert "The revisions have no prompt in common." in repository.run()
    assert not list(Path("compare").glob("*/samples.png"))


def test_names_alike_have_thumbnails_of_their_own(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for branch in ("try/a", "try-a"):
        git("branch", branch)
    monkeypatch.setattr(sheets, "draw_thumbnails", lambda a, b, path: path)
    found = sheets.draw_images([revision_report.read_revision(name) for name in ("main", "try/a", "try-a")], Path())
    assert found["dataset try/a"] != found["dataset try-a"]
