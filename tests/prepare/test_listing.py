"""How problems are said: together for one picture, and not by the hundred thousand."""

from __future__ import annotations

import pytest

from stages.prepare.listing import MAX_LINES, Problem, lines, reasons

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
    assert Problem(place, "x").file == file


def test_a_flood_from_one_file_is_cut() -> None:
    flood = [Problem(f"{TABLE}:{row}", "text: got null") for row in range(1, 100_001)]
    other = Problem("data/raw/b.png", "'b.png' is an empty file")
    said = lines([*flood, other])
    assert said[:2] == [f"{TABLE}:1: text: got null", f"{TABLE}:2: text: got null"]
    assert said[MAX_LINES:] == [f"{TABLE}: and 99,900 more problems", str(other)]
    assert lines(flood[:MAX_LINES]) == [str(problem) for problem in flood[:MAX_LINES]]


def test_everything_that_is_wrong_with_a_picture_is_kept() -> None:
    problems = [
        Problem(f"{TABLE}:3", "text: got null", "a.png"),
        Problem(f"{TABLE}:3", "split: got 7", "a.png"),
        Problem("data/raw/a.png", "'a.png' has no mask", "a.png"),
        Problem(f"{TABLE}:9", "no valid JSON"),
    ]
    assert reasons(problems) == {
        "a.png": f"{TABLE}:3: text: got null; split: got 7; data/raw/a.png: 'a.png' has no mask",
        f"{TABLE}:9": f"{TABLE}:9: no valid JSON",
    }
