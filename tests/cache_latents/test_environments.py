"""Entries that other versions made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_dag.artifacts.store import Store
from stages.cache_latents import context
from tests.helpers.encodings import encode
from tests.helpers.workspace import Workspace, make_image


class Machine:
    """Stand-in for the recorded environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: dict[str, str | int] = {}
        environment = context.environment
        monkeypatch.setattr(context, "environment", lambda device: environment(device) | self.changes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def mixtures(lines: list[str]) -> list[str]:
    return [line for line in lines if line.endswith("[mixed-environments]")]


def test_entries_of_several_environments_are_warned_of(workspace: Workspace, machine: Machine) -> None:
    machine.changes = {"torch": "1.0"}
    encode(workspace)
    machine.changes = {"torch": "1.1"}
    assert mixtures(workspace.run("cache_latents")) == []  # all of one
    make_image(50).save("data/raw/05.png")
    workspace.run("prepare")
    (line,) = mixtures(workspace.run("cache_latents"))
    assert "7 latents were made with torch 1.0, 1 with torch 1.1" in line
    assert f"Delete {Path('.state/store/latents').resolve()} " in line
    assert mixtures(workspace.run("status")) == [line]
    shutil.rmtree(".state/store/latents")
    assert mixtures(workspace.run("cache_latents")) == []


def test_irrelevant_packages_are_no_mixture(workspace: Workspace, machine: Machine) -> None:
    encode(workspace)
    machine.changes = {"peft": "0.0.1", "python": "3.0"}
    make_image(50).save("data/raw/05.png")
    workspace.run("prepare")
    assert mixtures(workspace.run("cache_latents")) == []


def test_entries_without_a_record_are_no_mixture(workspace: Workspace, machine: Machine) -> None:
    encode(workspace)
    store = Store()
    for kind, path in store.entries():
        entry = store.load(kind, path.stem)
        assert entry is not None and entry.made_by
        store.save(kind, path.stem, entry.tensors)
    machine.changes = {"torch": "1.1"}
    make_image(50).save("data/raw/05.png")
    workspace.run("prepare")
    assert mixtures(workspace.run("cache_latents")) == []
