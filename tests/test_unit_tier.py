"""The quick tier refuses processes, and a module that names them is no part of it."""

from __future__ import annotations

import pytest

from tests.helpers import unit_tier
from tests.helpers.workspace import REPOSITORY


@pytest.mark.parametrize("event", ["subprocess.Popen", "os.posix_spawn", "os.fork"])
def test_a_unit_test_that_starts_a_process_fails(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_tier, "guarded", True)
    with pytest.raises(RuntimeError, match="a unit test started a process .*; mark it with pytest.mark.process"):
        unit_tier.refuse_processes(event, ("git",))
    unit_tier.refuse_processes("open", ("a.txt",))
    monkeypatch.setattr(unit_tier, "guarded", False)
    unit_tier.refuse_processes(event, ("git",))


@pytest.mark.parametrize(
    ("module", "starts"), [("core/test_console.py", True), ("diffusion/test_objectives.py", False)]
)
def test_modules_that_name_processes(module: str, starts: bool) -> None:
    assert unit_tier.starts_processes(REPOSITORY / "tests" / module) is starts
