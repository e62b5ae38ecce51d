"""Problems of rows: grouped by image, and limited in number."""

from __future__ import annotations

import pytest

from stages.prepare.listing import MAX_LINES, RowProblem, first_problems, reasons
from tests.helpers.errors import assert_are

TABLE = "data/raw/metadata.jsonl"


@pytest.mark.parametrize(
    ("place", "file"),
    [
        (f"{TABLE}:17", TABLE),
        ("data/raw/sub/a.png", "data/raw/sub"),
        ("a.png", "."),
        ("data/raw/12:30.png", "data/raw"),
    ],
)
def test_file_of_a_problem(place: str, file: str) -> None:
    assert RowProblem("x", "x", place).file == file


def test_problems_of_one_file_are_limited() -> None:
    flood = [RowProblem("caption-not-text", "text: got null.", f"{TABLE}:{row}") for row in range(1, 100_001)]
    other = RowProblem("image-empty", "'b.png' is an empty file.", "data/raw/b.png")
    printed = first_problems([*flood, other])
    assert printed[:2] == [f"{TABLE}:1: text: got null.", f"{TABLE}:2: text: got null."]
    assert {problem.code for problem in printed[:MAX_LINES]} == {"caption-not-text"}
    assert_are(printed[MAX_LINES:], ("more-problems", f"{TABLE}: 99,900 "), ("image-empty", str(other)))
    assert first_problems(flood[:MAX_LINES]) == [problem.problem for problem in flood[:MAX_LINES]]


def test_reasons_join_all_problems_of_an_image() -> None:
    problems = [
        RowProblem("caption-not-text", "text: got null.", f"{TABLE}:3", "a.png"),
        RowProblem("split-invalid", "split: got 7.", f"{TABLE}:3", "a.png"),
        RowProblem("mask-missing", "'a.png' has no mask.", "data/raw/a.png", "a.png"),
        RowProblem("json-invalid", "no valid JSON.", f"{TABLE}:9"),
    ]
    assert reasons(problems) == {
        "a.png": f"{TABLE}:3: text: got null. split: got 7. data/raw/a.png: 'a.png' has no mask.",
        f"{TABLE}:9": f"{TABLE}:9: no valid JSON.",
    }
