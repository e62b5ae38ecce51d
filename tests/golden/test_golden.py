"""Every stage's values are those that are recorded for its number ``RESULTS``; a change of either alone is red."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import record
from tests.golden.__main__ import run
from tests.golden.runs import RUNS

CASES = [(stage, name) for stage, runs in RUNS.items() for name in runs]
STORE = {
    "cache_latents": " Raise decode.VERSION, keys.FORMAT or keys.MASK_FORMAT as well (tests/cache_latents/"
    "test_store_keys.py), or runs read the store's old entries."
}


@pytest.mark.parametrize(("stage", "name"), CASES, ids=[f"{stage}-{name}" for stage, name in CASES])
def test_values_are_those_recorded(stage: str, name: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    recorded = record.read(stage)["runs"]
    assert name in recorded, f"{name} is not recorded; run `python -m tests.golden --write {stage}`"
    found = record.moved(recorded[name], run(stage, name, tmp_path, bases))
    number = record.number_of(stage)
    cure = (
        f"These values of {stage} moved. If they are right, set RESULTS = {number + 1} in stages/{stage}/__init__.py "
        f"and run `python -m tests.golden --write {stage}`; a finished {stage} then runs again."
    ) + STORE.get(stage, "")
    assert not found, "\n".join([cure, *found])


@pytest.mark.parametrize("stage", RUNS)
def test_number_is_the_recorded_one(stage: str) -> None:
    assert record.number_problem(stage, record.read(stage)) is None


def test_every_recorded_run_is_a_run() -> None:
    assert {stage: set(record.read(stage)["runs"]) for stage in RUNS} == {
        stage: set(runs) for stage, runs in RUNS.items()
    }
