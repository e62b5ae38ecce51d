"""The rules of the record: what moves a value, and which numbers may be written."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.golden import record

RUN = {"val.loss_change": 2e-3, "losses": [1.0, 0.5], "adapter": {"count": 3, "norm": 2.0}, "names": "abc"}
MOVED = RUN | {"losses": [1.0, 0.51]}


def recorded(*versions: dict[str, Any]) -> dict[str, Any]:
    """After a number for each version of the run."""
    numbers = {str(index): record.digest({"sd": runs}) for index, runs in enumerate(versions, 1)}
    return {"RESULTS": numbers, "runs": {"sd": versions[-1]}}


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``at(2)`` sets ``RESULTS`` of train."""
    return lambda number: monkeypatch.setattr("stages.train.RESULTS", number)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"losses": [1.0, 0.5001]}, None),  # 2e-4 of it
        ({"losses": [1.0, 0.5002]}, "losses 1: 0.5002, recorded 0.5"),
        ({"val.loss_change": 2.09e-3}, None),  # a difference of losses, which are near 1
        ({"val.loss_change": 2.11e-3}, "val.loss_change: 0.00211, recorded 0.002"),
        ({"losses": [1.0]}, "losses 1: none, recorded 0.5"),
        ({"losses": [1.0, 0.5, 0.2]}, "losses 2: 0.2, recorded none"),
        ({"adapter": {"count": 4, "norm": 2.0}}, "adapter count: 4, recorded 3"),
        ({"adapter": {"count": 3, "norm": float("nan")}}, "adapter norm: nan, recorded 2.0"),
        ({"names": "abd"}, "names: abd, recorded abc"),
        ({"new": True}, "new: True, recorded none"),
    ],
)
def test_a_value_moves_beyond_the_tolerance(changes: dict[str, Any], line: str | None) -> None:
    assert record.moved(RUN, RUN | changes) == ([line] if line else [])


def test_moved_values_are_not_written_without_a_new_number(at: Any) -> None:
    at(1)
    before = recorded(RUN)
    found, problems = record.renewed("train", before, {"sd": MOVED})
    assert found == before
    assert problems == [
        "train sd: losses 1: 0.51, recorded 0.5",
        "train: values moved and RESULTS is 1 as before; set RESULTS = 2 in stages/train/__init__.py if the new values "
        "are right",
    ]


def test_a_new_number_is_not_written_without_moved_values(at: Any) -> None:
    at(2)
    before = recorded(RUN)
    found, (problem,) = record.renewed("train", before, {"sd": RUN, "new": MOVED})
    assert found == before and problem.startswith("stages/train/__init__.py: RESULTS is 2 and no value moved since 1")


@pytest.mark.parametrize("number", [0, 3])
def test_numbers_count_by_one(at: Any, number: int) -> None:
    at(number)
    _, problems = record.renewed("train", recorded(RUN), {"sd": MOVED})
    assert problems == [f"stages/train/__init__.py: RESULTS is {number}; after 1 comes 2"]


def test_a_new_number_with_moved_values_is_written_and_others_stay_as_recorded(at: Any) -> None:
    at(2)
    before = recorded(RUN)
    before["runs"]["dora"] = RUN
    found, problems = record.renewed("train", before, {"sd": MOVED, "dora": RUN | {"losses": [1.0, 0.50001]}})
    assert problems == [] and found["runs"] == {"sd": MOVED, "dora": RUN}
    assert found["RESULTS"] == before["RESULTS"] | {"2": record.digest(found["runs"])}
    assert record.number_problem("train", found) is None


def test_a_new_run_needs_no_new_number(at: Any) -> None:
    at(1)
    found, problems = record.renewed("train", recorded(RUN), {"sd": RUN, "new": MOVED})
    assert problems == [] and set(found["runs"]) == {"sd", "new"} and record.number_problem("train", found) is None


def test_a_number_without_its_values_is_found(at: Any) -> None:
    at(2)
    good = recorded(RUN, MOVED)
    assert record.number_problem("train", good) is None
    at(1)
    assert "RESULTS = 1, tests/golden/train.json has 2" in str(record.number_problem("train", good))
    at(3)
    assert "RESULTS = 3, tests/golden/train.json has 2" in str(record.number_problem("train", good))
    at(2)
    by_hand = copy.deepcopy(good)
    by_hand["runs"]["sd"]["losses"][0] = 1.5
    assert "the values are not number 2's" in str(record.number_problem("train", by_hand))
    assert "two numbers of RESULTS have the same values" in str(record.number_problem("train", recorded(RUN, RUN)))
    gap = {"RESULTS": {"1": "a", "3": record.digest({"sd": RUN})}, "runs": {"sd": RUN}}
    assert "without a gap" in str(record.number_problem("train", gap))


def test_two_branches_that_make_the_same_number_conflict() -> None:
    """Each moved another run: without the line of digests, git would merge both into one number 2."""
    runs = {"sd": RUN, "dora": RUN, "eva": RUN}
    texts = []
    for name in ("sd", "eva"):
        both = runs | {name: MOVED}
        numbers = {"1": record.digest(runs), "2": record.digest(both)}
        texts.append(record.layout({"RESULTS": numbers, "runs": both}).splitlines())
    before = record.layout({"RESULTS": {"1": record.digest(runs)}, "runs": runs}).splitlines()
    ours, theirs = ({i for i, line in enumerate(before) if line != text[i]} for text in texts)
    assert len(before) == len(texts[0]) == len(texts[1])
    (conflict,) = ours & theirs
    assert before[conflict].startswith('  "RESULTS": {"1": ')
