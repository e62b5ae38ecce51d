"""What changed in a dataset, as two tables of its images show it."""

from __future__ import annotations

from typing import Any

import pytest

from lora_dag.artifacts import image_table
from lora_dag.artifacts.image_table import Row
from lora_dag.commands.compare.dataset_changes import MAX_LISTED, compare_tables
from lora_dag.pages.markdown import code


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


def test_a_restored_image_is_not_added() -> None:
    found = compare_tables([*OLD, row("d", split="left out", sha256="", reason="bad")], [*OLD, row("d")])
    assert names(found.restored) == ["d"] and not found.added


def test_a_bad_second_row_of_a_kept_image_does_not_leave_it_out() -> None:
    found = compare_tables(OLD, [*OLD, row("c", split="left out", sha256="", reason="named twice")])
    assert not found


def test_an_edited_image_is_not_said_to_move() -> None:
    """Its side is drawn anew, from its new content."""
    found = compare_tables(OLD, [*OLD[:2], row("c", "other", split="heldout", captions="new")])
    assert found.summary() == "1 edited, 1 recaptioned"


def test_a_renamed_image_can_also_be_recaptioned() -> None:
    found = compare_tables(OLD, [*OLD[:2], row("d", "of c", captions="new")])
    assert found.summary() == "1 recaptioned, 1 renamed"


def test_copies_of_one_image_are_renamed_one_by_one() -> None:
    found = compare_tables([row("a", "x"), row("b", "x")], [row("b", "x"), row("c", "x"), row("d", "x")])
    assert names(found.renamed) == [("a", "c")] and names(found.added) == ["d"] and not found.removed


def test_tables_of_another_version_lack_columns() -> None:
    text = "file_name,split,sha256,captions\na,train,1,x\nb,train,2,y\n"
    assert not compare_tables(image_table.parse(text), image_table.parse(text))


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
