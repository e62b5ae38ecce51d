"""What is remembered of pictures: through kills, torn lines and two writers, and never of other code."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import PIL
import pytest

from lora_dag.pictures import pictures
from stages.prepare import memory
from stages.prepare.memory import Memory
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    return tmp_path / "store"


def add(*keys: int, kind: str = "checked") -> None:
    with Memory(kind) as found:
        for key in keys:
            found.add([key, True], {"a": [key / 3]})


def known(number: int, kind: str = "checked") -> list[int]:
    """Keys that a new run finds."""
    found = Memory(kind)
    return [key for key in range(number) if found.find([key, True]) is not None]


def test_values_come_back_as_they_were() -> None:
    add(1)
    assert Memory("checked").find([1, True]) == {"a": [1 / 3]}
    assert Memory("checked").find([1, False]) is None
    assert Memory("measured").find([1, True]) is None


def test_nothing_is_written_where_nothing_is_added(store: Path) -> None:
    with Memory("checked") as found:
        assert found.find("x") is None
    assert not store.exists()


KILLED = """
import os, signal
from stages.prepare.memory import Memory
found = Memory("checked")
for key in range(50):
    found.add([key, True], {"a": "x" * 1000})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert known(60) == list(range(50))


def test_a_torn_last_line_costs_one_value(store: Path) -> None:
    add(0, 1, 2)
    (path,) = store.iterdir()
    os.truncate(path, path.stat().st_size - 5)
    assert known(5) == [0, 1]
    add(3)
    assert known(5) == [0, 1, 3]


def write_many(start: int) -> None:
    add(*range(start, start + 500))


def test_two_processes_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(start,)) for start in (0, 500)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert known(1000) == list(range(1000))


def test_what_other_code_found_is_not_used_and_removed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(1)
    add(1, kind="measured")
    changed = tmp_path / "pictures.py"
    changed.write_text(Path(pictures.__file__).read_text(encoding="utf-8") + "\n# another way to look\n")
    monkeypatch.setattr(pictures, "__file__", str(changed))
    assert known(3) == []
    assert len(list(store.iterdir())) == 2  # a run that adds nothing removes nothing
    add(2)
    assert known(3) == [2]
    assert sorted(path.name.partition("-")[0] for path in store.iterdir()) == ["checked", "measured"]


def test_another_pillow_may_find_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    add(1)
    monkeypatch.setattr(PIL, "__version__", "0.0.1")
    assert known(3) == []


def test_it_is_bounded_and_the_latest_stay(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_REMEMBERED", 3)
    add(*range(10))
    add(10)
    assert known(20) == [7, 8, 9, 10]
    (path,) = store.iterdir()
    assert len(path.read_text().splitlines()) == 4
