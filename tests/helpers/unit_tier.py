"""``pytest -m unit``: the tests that a person runs at every save. They start no process and build no pipeline.

Every test is one, but those that are marked ``slow``, ``gpu``, ``peers`` or ``process``, those below tests/dag and
tests/golden, those of modules that name what starts processes, and those with a fixture that needs the tiny base. One
that starts a process after all fails there.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OTHER_MARKS = ("slow", "gpu", "peers", "process")
OTHER_FOLDERS = ("dag", "golden")
HEAVY_FIXTURES = {"tiny_base", "repository", "clone", "published"}
STARTS_PROCESSES = re.compile(r"\b(subprocess|sys\.executable|os\.fork|forked|planted|checkout)\b|\.process\(|\bgit\(")
PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system"}
"""Source: https://docs.python.org/3/library/audit_events.html"""

guarded = False


def is_unit(item: pytest.Item) -> bool:
    if any(item.get_closest_marker(mark) for mark in OTHER_MARKS):
        return False
    folder = item.path.relative_to(item.config.rootpath).parts[1]
    if folder in OTHER_FOLDERS or HEAVY_FIXTURES & set(getattr(item, "fixturenames", ())):
        return False
    return not starts_processes(item.path)


@functools.cache
def starts_processes(module: Path) -> bool:
    return bool(STARTS_PROCESSES.search(module.read_text(encoding="utf-8")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_unit(item):
            item.add_marker(pytest.mark.unit)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "unit":
        sys.addaudithook(refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    global guarded
    guarded = True
    try:
        return (yield)
    finally:
        guarded = False


def refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if guarded and event in PROCESS_EVENTS:
        raise RuntimeError(f"a unit test started a process ({event}); mark it with pytest.mark.process")
