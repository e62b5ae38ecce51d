"""What changed in a dataset: told from two tables alone, shown against the committed one, never in a stage's way."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag.artifacts import picture_table
from lora_dag.artifacts.picture_table import Row
from lora_dag.core.files import sha256_file
from lora_dag.pages import thumbnails
from lora_dag.pages.dataset_changes import MAX_LISTED, Changes, compare_tables
from lora_dag.pages.markdown import code
from stages.prepare import changes, page
from tests.conftest import Pictures, picture
from tests.helpers.images import encoded
from tests.helpers.manifests import item_of, manifest_of, reader


def row(file_name: str, sha256: str = "", **changes: str) -> Row:
    values = {"split": "train", "captions": "a thing", "num_captions": "1", "sha256": sha256 or f"of {file_name}"}
    return values | {"file_name": file_name} | changes


def names(rows: list[Any]) -> list[Any]:
    return [tuple(each["file_name"] for each in r) if isinstance(r, tuple) else r["file_name"] for r in rows]


OLD = [row("a"), row("b"), row("c")]


@pytest.mark.parametrize(
    ("new", "kind", "expected", "summary"),
    [
        ([*OLD, row("d"), row("e")], "added", ["d", "e"], "2 added"),
        (OLD[:2], "removed", ["c"], "1 removed"),
        ([*OLD[:2], row("c", "other")], "edited", [("c", "c")], "1 edited"),
        ([*OLD[:2], row("c", captions="new")], "recaptioned", [("c", "c")], "1 recaptioned"),
        ([*OLD[:2], row("c", num_captions="2")], "recaptioned", [("c", "c")], "1 recaptioned"),
        ([*OLD[:2], row("c", captions_digest="0")], "recaptioned", [("c", "c")], "1 recaptioned"),
        ([*OLD[:2], row("d", "of c")], "renamed", [("c", "d")], "1 renamed"),
        ([*OLD[:2], row("c", split="heldout")], "moved", [("c", "c")], "1 moved across the split"),
        ([*OLD[:2], row("c", split="left out", sha256="", reason="bad")], "left_out", ["c"], "1 left out"),
        ([*OLD, row("d", split="left out", reason="bad")], "left_out", ["d"], "1 left out"),
    ],
)
def test_each_kind_of_change_is_told_alone(new: list[Row], kind: str, expected: list[Any], summary: str) -> None:
    found = compare_tables([old | {"captions_digest": ""} for old in OLD], [{"captions_digest": ""} | n for n in new])
    assert names(getattr(found, kind)) == expected
    assert found.summary() == summary and found


def test_equal_tables_have_no_changes_in_any_order() -> None:
    found = compare_tables(OLD, OLD[::-1])
    assert not found and found.summary() == "none" and found.markdown() == ""
    assert not compare_tables([], [])


def test_a_picture_taken_back_is_not_added() -> None:
    found = compare_tables([*OLD, row("d", split="left out", sha256="", reason="bad")], [*OLD, row("d")])
    assert names(found.taken_back) == ["d"] and not found.added


def test_a_bad_second_row_of_a_kept_picture_does_not_leave_it_out() -> None:
    found = compare_tables(OLD, [*OLD, row("c", split="left out", sha256="", reason="named twice")])
    assert not found


def test_an_edited_picture_is_not_said_to_move() -> None:
    """Its side is drawn anew, from its new content."""
    found = compare_tables(OLD, [*OLD[:2], row("c", "other", split="heldout", captions="new")])
    assert found.summary() == "1 edited, 1 recaptioned"


def test_a_renamed_picture_can_also_be_recaptioned() -> None:
    found = compare_tables(OLD, [*OLD[:2], row("d", "of c", captions="new")])
    assert found.summary() == "1 recaptioned, 1 renamed"


def test_copies_of_one_picture_are_renamed_one_by_one() -> None:
    found = compare_tables([row("a", "x"), row("b", "x")], [row("b", "x"), row("c", "x"), row("d", "x")])
    assert names(found.renamed) == [("a", "c")] and names(found.added) == ["d"] and not found.removed


def test_tables_of_another_version_lack_columns() -> None:
    text = "file_name,split,sha256,captions\na,train,1,x\nb,train,2,y\n"
    assert not compare_tables(picture_table.parse(text), picture_table.parse(text))


def test_markdown_lists_names_and_captions_and_is_cut() -> None:
    many = [row(f"{i:03}.png") for i in range(MAX_LISTED + 5)]
    new = [*many, row("a", captions="then <b>`now`</b>\n# head"), row("d", "of c"), row("b", "of b", split="heldout")]
    text = compare_tables(OLD, new).markdown()
    assert f"**{MAX_LISTED + 5} added**" in text and "- and 5 more" in text
    assert text.count("\n- `0") == MAX_LISTED
    assert "- `a`: `a thing` → `` then <b>`now`</b> # head ``" in text
    assert "- `c` → `d`" in text and "- `b`: training → held-out" in text


def test_code_spans_hold_anything() -> None:
    assert code("a\n`b`  c") == "`` a `b` c ``"
    assert code("``") == "``` `` ```"
    assert code("turned \u202eround\x1b[2K") == "`turned U+202EroundU+001B[2K`"
    assert code("x" * 500) == f"`{'x' * 99}…`"
    assert code("") == "(empty)"


# Against the committed version


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


FOLDER = Path("reports/dataset")
Prepare = Callable[..., list[str]]


@pytest.fixture
def prepare(
    tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Prepare:
    """``prepare(captions={})`` does what the stage's end does for raw/*.png; its log lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    caplog.set_level(logging.INFO, logger="lora-dag")
    raw = pictures(tmp_path / "raw")

    def run(captions: dict[str, str] | None = None) -> list[str]:
        caplog.clear()
        items = [
            item_of(raw, path.name, caption=(captions or {}).get(path.name, path.stem))
            for path in sorted(raw.glob("*.png"))
        ]
        page.write(manifest_of(raw, items), [], [], 0, reader(raw), FOLDER)
        changes.report(manifest_of(raw, items), reader(raw), FOLDER)
        return [record.getMessage() for record in caplog.records]

    return run


def commit() -> None:
    git("init", "-q")
    git("add", str(FOLDER / "pictures.csv"))
    git("commit", "-q", "-m", "Dataset")


def change_everything() -> dict[str, str]:
    """One picture edited, removed, added, renamed and recaptioned each."""
    picture(50).save("raw/00.png")
    Path("raw/01.png").unlink()
    picture(51).save("raw/new.png")
    Path("raw/02.png").rename("raw/moved.png")
    return {"03.png": "another caption", "moved.png": "02"}


def test_changes_since_the_committed_version(prepare: Prepare) -> None:
    assert prepare() == ["changes     not shown: git holds no earlier pictures.csv"]
    commit()
    assert prepare() == ["changes     none since the committed version"]
    assert not list(FOLDER.glob("changes.*"))
    (line,) = prepare(change_everything())
    summary = "1 added, 1 removed, 1 edited, 1 recaptioned, 1 renamed"
    assert line == f"changes     {summary} since the committed version; reports/dataset/changes.md"
    text = (FOLDER / "changes.md").read_text()
    assert f": {summary}.\n\n" in text and "\n\n![Thumbnails](changes.png)\n" in text
    assert "- `03.png`: `03` → `another caption`" in text and "- `02.png` → `moved.png`" in text
    with Image.open(FOLDER / "changes.png") as sheet:
        assert sheet.info == {} and sheet.height > 4 * thumbnails.CELL  # a row of each kind but renamed


def test_a_stale_page_shows_as_one(prepare: Prepare) -> None:
    """DVC restores the outputs of an earlier version and leaves the page, which it does not track."""
    prepare()
    commit()
    table = FOLDER / "pictures.csv"
    old = sha256_file(table)[:12]
    prepare(change_everything())
    new = sha256_file(table)[:12]
    assert f"`pictures.csv` was `{old}` and is `{new}`, the first digits of its" in (FOLDER / "changes.md").read_text()


def test_nothing_stale_is_left_when_a_change_is_undone(prepare: Prepare) -> None:
    prepare()
    commit()
    prepare({"03.png": "another caption"})
    assert len(list(FOLDER.glob("changes.*"))) == 2
    prepare()
    assert not list(FOLDER.glob("changes.*"))


def test_thumbnails_of_an_older_version_may_be_lost(prepare: Prepare) -> None:
    prepare()
    commit()
    for path in Path(".state").rglob("*.jpg"):
        path.unlink()
    assert len(prepare(change_everything())) == 1
    with Image.open(FOLDER / "changes.png") as sheet:
        assert sheet.height > 4 * thumbnails.CELL


def test_thumbnails_are_made_once(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    assert len(list(Path(".state").rglob("*.jpg"))) == 8
    monkeypatch.setattr(changes, "load_view", None)
    assert prepare() == ["changes     not shown: git holds no earlier pictures.csv"]


def test_thumbnails_are_made_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content, each row group of a Parquet file would be read again and again."""
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "x.png").write_bytes(encoded(picture(0)))
    one = item_of(tmp_path, "x.png")
    items = [replace(one, file_name=f"a.parquet::{i}", sha256=f"{i * 7 % 12:064x}") for i in range(12)]
    read: list[str] = []

    def counted(name: str) -> bytes:
        read.append(name)
        return (tmp_path / "x.png").read_bytes()

    changes.keep_thumbnails(changes.wanted(items, Changes()), manifest_of(tmp_path, items), counted)
    assert read == [f"a.parquet::{i}" for i in range(12)]


def test_thumbnails_are_bounded_but_what_changed_has_one(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_THUMBNAILS", 2)
    prepare()
    assert len(list(Path(".state").rglob("*.jpg"))) == 2
    commit()
    prepare({f"{i:02}.png": "new" for i in range(8)})
    assert len(list(Path(".state").rglob("*.jpg"))) == 8


def test_a_thumbnail_keeps_its_shape_and_a_damaged_one_is_made_again(tmp_path: Path, prepare: Prepare) -> None:
    picture(3, 200, 100).save("raw/00.png")
    prepare()
    sha256 = item_of(Path("raw"), "00.png").sha256
    image = thumbnails.find(sha256)
    assert image is not None and image.size == (64, 32)
    thumbnails.path_of(sha256).write_bytes(b"\xff\xd8\xff")
    assert thumbnails.find(sha256) is None
    prepare()
    assert thumbnails.find(sha256) is not None


def test_outside_a_repository_nothing_is_shown(prepare: Prepare) -> None:
    assert prepare() == ["changes     not shown: git holds no earlier pictures.csv"]


def test_without_git_nothing_is_shown(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    commit()
    monkeypatch.setenv("PATH", "")
    assert prepare() == ["changes     not shown: git holds no earlier pictures.csv"]


def test_a_damaged_committed_table_fails_no_stage(prepare: Prepare) -> None:
    prepare()
    (FOLDER / "pictures.csv").write_text("nonsense\n")
    commit()
    (line,) = prepare()
    assert line.startswith("warning: what changed in the dataset is not shown (ValueError: no columns file_name")


def test_a_full_state_directory_fails_no_stage(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / ".state/store").mkdir(parents=True)
    (tmp_path / ".state/store/thumbnails").write_text("a file where a folder should be")
    (line,) = prepare()
    assert line.startswith("warning: what changed in the dataset is not shown (")
    assert (FOLDER / "pictures.csv").exists()


def test_no_thumbnail_no_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    assert thumbnails.changes_sheet(Changes(added=[row("a", "0" * 64)])) is None
    assert thumbnails.changes_sheet(Changes()) is None
