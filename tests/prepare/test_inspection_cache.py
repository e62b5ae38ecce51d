"""Cache of inspected images: kills, damage, two writers, other code versions."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import PIL
import pytest

from stages.prepare import inspection_cache
from stages.prepare.inspection_cache import InspectionCache
from tests.helpers.errors import assert_line
from tests.helpers.workspace import REPOSITORY


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path))
    return tmp_path / "store"


def add(*keys: int, kind: str = "checked") -> None:
    with InspectionCache(kind) as cache:
        for key in keys:
            cache.add([key, True], {"a": [key / 3]})


def known(number: int, kind: str = "checked") -> list[int]:
    """Keys that a new run finds."""
    with InspectionCache(kind) as cache:
        return [key for key in range(number) if cache.find([key, True]) is not None]


def database(store: Path) -> Path:
    (path,) = store.glob("*.sqlite")
    return path


def test_values_come_back_as_they_were() -> None:
    add(1)
    assert InspectionCache("checked").find([1, True]) == {"a": [1 / 3]}
    assert InspectionCache("checked").find([1, False]) is None
    assert InspectionCache("measured").find([1, True]) is None


def test_no_file_is_written_without_new_values(store: Path) -> None:
    with InspectionCache("checked") as cache:
        assert cache.find("x") is None
    assert not store.exists()


def test_a_database_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open one keeps its file, and its lock, until Python frees it."""
    failing = Mock(execute=Mock(side_effect=sqlite3.OperationalError("disk I/O error")))
    monkeypatch.setattr(inspection_cache, "open_database", lambda path: failing)
    add(1)
    assert failing.close.call_count == 1


KILLED = """
import os, signal
from stages.prepare.inspection_cache import InspectionCache
cache = InspectionCache("checked")
for key in range(50):
    cache.add([key, True], {"a": "x" * 1000})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert known(60) == list(range(50))


@pytest.mark.parametrize("damage", ["another file", "torn"])
def test_a_damaged_file_is_set_aside_and_replaced(store: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    add(*range(200))
    path = database(store)
    blob = path.read_bytes()
    path.write_bytes(b"no database" * 500 if damage == "another file" else blob[:100] + b"\xff" * 8000 + blob[8100:])
    damaged = path.read_bytes()
    assert known(5) == []
    assert_line("\n".join(caplog.messages), "cache-damaged", str(path))
    assert path.with_suffix(".sqlite-damaged").read_bytes() == damaged
    add(3)
    assert known(5) == [3]


def test_values_added_after_damage_are_kept(store: Path) -> None:
    add(1)
    database(store).write_bytes(b"no database" * 500)
    with InspectionCache("checked") as cache:
        assert cache.find([1, True]) is None
        cache.add([2, True], {})
    assert known(5) == [2]


def test_an_unwritable_store_gives_a_warning(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.write_text("a file where a folder should be")
    with InspectionCache("checked") as cache:
        for key in range(3):
            cache.add([key, True], {})
        assert cache.find([1, True]) is None
    (line,) = caplog.messages
    assert_line(line, "cache-unusable", str(store))


def test_a_locked_file_gives_a_warning(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_cache, "LOCK_SECONDS", 0.05)
    add(1)
    other = sqlite3.connect(database(store))
    other.execute("BEGIN EXCLUSIVE")
    with InspectionCache("checked") as cache:
        assert cache.find([1, True]) is None
        cache.add([2, True], {})
    (line,) = caplog.messages
    assert_line(line, "cache-unusable", str(database(store)), "database is locked")
    other.close()
    assert known(5) == [1]


def write_many(start: int) -> None:
    logging.disable()
    add(*range(start, start + 300))


def test_two_processes_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(start,)) for start in (0, 300)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert known(600) == list(range(600))


def test_the_file_is_writable_for_the_group(store: Path) -> None:
    before = os.umask(0o002)
    try:
        add(1)
    finally:
        os.umask(before)
    assert database(store).stat().st_mode & 0o777 == 0o664


def test_files_of_other_code_versions_are_removed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(1)
    monkeypatch.setattr(inspection_cache, "code_version", lambda: "other")
    assert known(3) == []
    assert len(list(store.iterdir())) == 1  # a run that adds nothing removes nothing
    add(2)
    assert known(3) == [2]
    assert [path.name for path in store.iterdir()] == ["inspected-other.sqlite"]


def test_the_version_is_that_of_the_code_and_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = inspection_cache.code_version()
    for source in Path(inspection_cache.checks.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(inspection_cache.checks, "__file__", str(tmp_path / "checks.py"))
    assert inspection_cache.code_version() == now
    with (tmp_path / "checks.py").open("a") as file:
        file.write("\n# another way to look\n")
    assert inspection_cache.code_version() != now
    monkeypatch.undo()
    monkeypatch.setattr(PIL, "__version__", "0.0.1")
    assert inspection_cache.code_version() != now


def test_it_is_bounded_and_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_cache, "MAX_OTHERS", 3)
    add(*range(10), kind="measured")
    add(*range(10))
    add(10)
    assert known(20) == [7, 8, 9, 10]
    assert known(20, kind="measured") == list(range(10))


def test_used_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    add(*range(10))
    monkeypatch.setattr(inspection_cache, "MAX_OTHERS", 3)
    with InspectionCache("checked") as cache:
        assert cache.find([0, True]) and cache.find([1, True])
        cache.add([10, True], {})
    assert known(20) == [0, 1, 7, 8, 9, 10]
