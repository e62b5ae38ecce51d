from __future__ import annotations

import json
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages import prepare
from stages.artifacts.manifest import Manifest
from stages.core import params
from stages.core.console import UserError
from tests.conftest import Workspace, picture, read_rows, write_rows


def problems(workspace: Workspace, *argv: str) -> tuple[str, ...]:
    """The lines that prepare refuses the input with, having written nothing."""
    with pytest.raises(UserError) as caught:
        workspace.run("prepare", *argv)
    assert not (workspace.path / "data" / "prepared").exists()
    assert not (workspace.path / "reports").exists()
    return caught.value.problems


def only_problem(workspace: Workspace, *argv: str) -> str:
    (problem,) = problems(workspace, *argv)
    return problem


def prepared(workspace: Workspace, *argv: str) -> Manifest:
    workspace.run("prepare", *argv)
    return Manifest.load(workspace.path / "data" / "prepared")


def test_outputs(workspace: Workspace) -> None:
    lines = workspace.run("prepare")
    manifest = Manifest.load(Path("data/prepared"))
    metrics = json.loads(Path("reports/dataset/metrics.json").read_text())
    assert [item.file_name for item in manifest.items] == [f"{index:02}.png" for index in range(8)]
    assert {item.split for item in manifest.items} == {"train", "heldout"}
    assert manifest.items[3].caption == "thing 3"
    assert manifest.items[3].views[0].crop == (0, 0, 48, 48)
    assert (metrics["num_pictures"], metrics["num_views"], metrics["num_unlisted"]) == (8, 8, 0)
    assert metrics["num_train"] == sum(item.split == "train" for item in manifest.items)
    assert metrics["caption_words_median"] == 2
    assert metrics["chroma"] > 50
    assert lines[-1] == "next        python -m stages.cache_latents"
    with Image.open("reports/dataset/contact.png") as contact:
        assert contact.info == {}
    assert Path("reports/dataset/contact.png").stat().st_size <= 200_000


def test_pixel_measures_hold_one_picture_at_a_time(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    measured = prepare.chroma
    alive = []

    def chroma(array: Any) -> float:
        seen.append(weakref.ref(array))
        alive.append(sum(held() is not None for held in seen))
        return measured(array)

    monkeypatch.setattr(prepare, "chroma", chroma)
    workspace.run("prepare")
    assert len(alive) > 4 and max(alive) <= 2


def test_rows_are_read_without_opening_a_picture(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = params.load(Path("params.yaml")).section(prepare.DatasetParams)
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = None
    write_rows(Path("data/raw"), [*rows, rows[0]])
    monkeypatch.setattr(Image, "open", None)
    listed, problems = prepare.read_metadata(Path("data/raw"), dataset)
    assert [entry.file_name for entry in listed][:3] == ["00.png", "01.png", "02.png"]
    assert [problem.partition(": ")[0] for problem in problems] == [f"data/raw/metadata.jsonl:{n}" for n in (3, 9)]


def test_same_input_same_bytes(workspace: Workspace) -> None:
    workspace.run("prepare")
    first = workspace.tree("data/prepared") | workspace.tree("reports")
    shutil.rmtree("data/prepared")
    shutil.rmtree("reports")
    os.utime("data/raw/00.png", (0, 0))
    workspace.run("prepare")
    assert workspace.tree("data/prepared") | workspace.tree("reports") == first


def test_more_pictures_move_none(workspace: Workspace, pictures: Callable[..., Path]) -> None:
    before = {item.file_name: item.split for item in prepared(workspace).items}
    pictures(workspace.path / "data" / "raw", 24)
    after = {item.file_name: item.split for item in prepared(workspace).items}
    assert len(after) == 24
    assert before.items() <= after.items()


def test_equal_files_on_one_side_and_warned(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    for index in range(8):
        shutil.copy(f"data/raw/{index:02}.png", f"data/raw/copy-{index:02}.png")
    write_rows(Path("data/raw"), rows + [{"file_name": f"copy-{row['file_name']}", "text": "x"} for row in rows])
    lines = workspace.run("prepare")
    split = {item.file_name: item.split for item in Manifest.load(Path("data/prepared")).items}
    assert all(split[row["file_name"]] == split[f"copy-{row['file_name']}"] for row in rows)
    assert "warning: 8 pictures have the same bytes as another one and weigh double" in lines


def test_seed_changes_the_split(workspace: Workspace, pictures: Callable[..., Path]) -> None:
    pictures(workspace.path / "data" / "raw", 24)
    splits = {
        tuple(item.split for item in prepared(workspace, "--set", f"dataset.seed={seed}").items) for seed in (0, 1)
    }
    assert len(splits) == 2


def test_random_crops_and_flip(workspace: Workspace) -> None:
    picture(0, 90, 40).save("data/raw/00.png")
    argv = ("--set", "dataset.crop=random", "--set", "dataset.num_crops=3", "--set", "dataset.flip=true")
    views = prepared(workspace, *argv).items[0].views
    assert len(views) == 6
    assert len({view.crop for view in views}) == 3
    assert all((right - left, bottom - top) == (40, 40) for left, top, right, bottom in (view.crop for view in views))
    assert all(0 <= view.crop[0] <= 50 for view in views)
    assert prepared(workspace, *argv).items[0].views == views
    os.rename("data/raw/00.png", "data/raw/renamed.png")
    write_rows(Path("data/raw"), [{"file_name": "renamed.png", "text": "x"}, *read_rows(Path("data/raw"))[1:]])
    assert prepared(workspace, *argv).items[-1].views == views


def test_square_pictures_are_cropped_once(workspace: Workspace) -> None:
    lines = workspace.run("prepare", "--set", "dataset.crop=random", "--set", "dataset.num_crops=3")
    assert "warning: dataset.crop random changes nothing for 8 square pictures" in lines
    assert all(len(item.views) == 1 for item in Manifest.load(Path("data/prepared")).items)


def test_unlisted_pictures_warned_and_licence_is_none(workspace: Workspace) -> None:
    picture(9).save("data/raw/extra.png")
    Path("data/raw/LICENSE").write_text("MIT")
    lines = workspace.run("prepare")
    assert "warning: 1 pictures in data/raw are not in metadata.jsonl and are left out" in lines
    assert json.loads(Path("reports/dataset/metrics.json").read_text())["num_unlisted"] == 1


def test_empty_caption_is_allowed_and_counted(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[0]["text"] = ""
    write_rows(Path("data/raw"), rows)
    assert "warning: 1 captions are empty; those pictures are learned without a prompt" in workspace.run("prepare")


def test_bom_crlf_and_subfolders_are_read(workspace: Workspace) -> None:
    Path("data/raw/sub").mkdir()
    os.rename("data/raw/00.png", "data/raw/sub/00.png")
    rows = [{"file_name": "sub/00.png", "text": "größer"}, *read_rows(Path("data/raw"))[1:]]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("data/raw/metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    items = prepared(workspace).items
    assert (items[-1].file_name, items[-1].caption) == ("sub/00.png", "größer")


# Refused: the parameters


def test_crops_need_random(workspace: Workspace) -> None:
    problem = only_problem(workspace, "--set", "dataset.num_crops=2")
    assert problem == "params.yaml dataset: num_crops 2 needs crop: random; there is one center crop only"


def test_background_is_a_colour(workspace: Workspace) -> None:
    assert only_problem(workspace, "--set", "dataset.background=white").startswith(
        "params.yaml dataset.background: got 'white';"
    )


@pytest.mark.parametrize(("fraction", "split"), [(0.001, "heldout"), (0.999, "train")])
def test_empty_split(workspace: Workspace, fraction: float, split: str) -> None:
    problem = only_problem(workspace, "--set", f"dataset.heldout_fraction={fraction}")
    assert problem.startswith(
        f"params.yaml dataset.heldout_fraction: {fraction} of 8 pictures leaves the {split} split empty;"
    )


def test_missing_folder(workspace: Workspace) -> None:
    problem = only_problem(workspace, "--set", "dataset.source=data/none")
    assert problem.startswith("params.yaml dataset.source: 'data/none' is no folder;")


def test_wrong_caption_column_is_one_line(workspace: Workspace) -> None:
    problem = only_problem(workspace, "--set", "dataset.caption_column=caption")
    assert problem == (
        "params.yaml dataset.caption_column: 'caption' is no column of data/raw/metadata.jsonl; it has text"
    )


# Refused: metadata.jsonl


def test_no_metadata(workspace: Workspace) -> None:
    os.remove("data/raw/metadata.jsonl")
    problem = only_problem(workspace)
    assert problem.startswith("data/raw/metadata.jsonl: no such file; expected one JSON row per picture, such as {")


def test_empty_dataset(workspace: Workspace) -> None:
    Path("data/raw/metadata.jsonl").write_text("\n")
    assert only_problem(workspace) == "data/raw/metadata.jsonl: no rows; the dataset is empty"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{oops", "no valid JSON (Expecting property name"),
        (b'{"file_name": "00.png", "text": "\xff"}', "not UTF-8 text"),
        (b'["00.png"]', "got list; expected one JSON object per line"),
        (b'{"file_name": "spare.png"}', "no 'text' column"),
        (b'{"file_name": "spare.png", "text": null}', "text: got null; expected a string"),
        (b'{"file_name": "spare.png", "text": 3}', "text: got 3; expected a string"),
        (b'{"file_name": "spare.png", "text": "\\ud800"}', 'text: "\\ud800" holds half a character'),
        (b"[" * 100_000, "no valid JSON (maximum recursion depth exceeded"),
        (b'{"text": "x"}', "file_name: got null; expected the name of a picture in data/raw"),
        (b'{"file_name": "../x.png", "text": "x"}', "file_name: '../x.png' leaves data/raw"),
        (b'{"file_name": "/x.png", "text": "x"}', "file_name: '/x.png' leaves data/raw"),
        (b'{"file_name": "x.png", "text": "x"}', "file_name: 'x.png' is no file in data/raw"),
        (b'{"file_name": "a\\u0000.png", "text": "x"}', "holds a control character"),
        (b'{"file_name": "01.png", "text": "x"}', "'01.png' is named on line 2 already"),
        (b'{"file_name": "outside.png", "text": "x"}', "file_name: 'outside.png' is a link that leaves data/raw"),
        (b'{"file_name": "dangling.png", "text": "x"}', "file_name: 'dangling.png' is no file"),
        (b'{"file_name": "folder.png", "text": "x"}', "file_name: 'folder.png' is not a regular file"),
    ],
)
def test_bad_row(workspace: Workspace, row: bytes, message: str) -> None:
    picture(9).save("data/elsewhere.png")
    picture(9).save("data/raw/spare.png")
    Path("data/raw/outside.png").symlink_to(workspace.path / "data" / "elsewhere.png")
    Path("data/raw/dangling.png").symlink_to("nothing.png")
    Path("data/raw/folder.png").mkdir()
    with open("data/raw/metadata.jsonl", "ab") as file:
        file.write(row + b"\n")
    problem = only_problem(workspace)
    assert problem.startswith("data/raw/metadata.jsonl:9: ")
    assert message in problem


# Refused: pictures


def bomb() -> bytes:
    """A PNG header that claims 10,000 x 8,500 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 8_500, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flipped_byte(blob: bytes) -> bytes:
    middle = blob.index(b"IDAT") + 40
    return blob[:middle] + bytes([blob[middle] ^ 0xFF]) + blob[middle + 1 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda blob: b"", "is an empty file"),
        (lambda blob: b"<html>no</html>", "is no JPEG, PNG or WebP picture"),
        (lambda blob: blob[: len(blob) // 2], "is damaged ("),
        (flipped_byte, "is damaged ("),
        (lambda blob: bomb(), "has 10000 x 8500 pixels; at most 80,000,000 are read"),
    ],
    ids=["empty", "html", "truncated", "flipped", "bomb"],
)
def test_bad_picture(workspace: Workspace, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = Path("data/raw/02.png")
    path.write_bytes(spoil(path.read_bytes()))
    problem = only_problem(workspace)
    assert problem.startswith("data/raw/metadata.jsonl:3: '02.png' ")
    assert message in problem


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animation(workspace: Workspace, suffix: str) -> None:
    frames = [picture(index) for index in range(2)]
    frames[0].save(f"data/raw/moving.{suffix}", save_all=True, append_images=frames[1:])
    write_rows(Path("data/raw"), [*read_rows(Path("data/raw")), {"file_name": f"moving.{suffix}", "text": "x"}])
    assert only_problem(workspace) == (
        f"data/raw/metadata.jsonl:9: 'moving.{suffix}' is animated; save one frame as a picture"
    )


def test_gif_is_refused(workspace: Workspace) -> None:
    picture(0).save("data/raw/02.png", format="GIF")
    assert "is no JPEG, PNG or WebP picture" in only_problem(workspace)


def test_too_small(workspace: Workspace) -> None:
    picture(0, 31, 80).save("data/raw/02.png")
    assert only_problem(workspace) == (
        "data/raw/metadata.jsonl:3: '02.png' has 31 x 80 pixels, less than dataset.resolution 32;"
        " use a larger picture or a smaller resolution"
    )


def test_size_is_checked_upright(workspace: Workspace) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 60, 40).save("data/raw/02.png", exif=exif)
    assert prepared(workspace).items[2].views[0].crop == (0, 10, 40, 50)


def test_all_problems_at_once_in_the_order_of_the_file(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[1]["text"] = None
    rows[5]["file_name"] = "../x.png"
    write_rows(Path("data/raw"), rows)
    Path("data/raw/03.png").write_bytes(b"")
    with open("data/raw/metadata.jsonl", "a") as file:
        file.write("{\n")
    found = [problem.split(": ")[0] for problem in problems(workspace)]
    assert found == [f"data/raw/metadata.jsonl:{number}" for number in (2, 4, 6, 9)]


def test_the_command_refuses_in_one_line(workspace: Workspace) -> None:
    Path("data/raw/03.png").write_bytes(b"")
    result = workspace.process("prepare")
    assert result.returncode == 2
    assert result.stderr == (
        "error: data/raw/metadata.jsonl:4: '03.png' is an empty file; restore it or remove the row\n"
    )
