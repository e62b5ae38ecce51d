"""Disks that refuse, memory that is short, folders that two want: one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stages.core import console
from tests.conftest import Workspace

STAGES = ("prepare", "cache_latents", "train", "validate", "export", "report")
OUTPUTS = ("data/prepared", "data/latents", "data/adapter", "data/export", "reports")
ROOT = pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system of its own")


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes: what a full disk does, in the middle of any write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def outcome(workspace: Workspace, stage: str, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the stage is refused with; empty where it came to its end."""
    capsys.readouterr()
    try:
        console.run(lambda: workspace.run(stage, *argv) and None)
    except SystemExit as ended:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert ended.code == 2 and len(lines) == 1, lines
        return lines[0]
    return ""


def written(workspace: Workspace) -> dict[str, bytes]:
    """All outputs, but for what differs between equal runs."""
    found = {f"{folder}/{name}": blob for folder in OUTPUTS for name, blob in workspace.tree(folder).items()}
    return {name: blob for name, blob in found.items() if not name.endswith("run.json")}


@pytest.fixture
def through(workspace: Workspace) -> dict[str, bytes]:
    """After all stages; what they wrote."""
    for stage in STAGES:
        workspace.run(stage)
    return written(workspace)


def test_a_full_disk_at_any_point_is_one_line_and_loses_nothing(
    workspace: Workspace, through: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file that a stage leaves is whole, and without the limit the same command ends in the same bytes."""
    for stage in STAGES:
        num_refused = 0
        for limit in (1, 8000):
            if stage == "cache_latents":
                shutil.rmtree(".state/store/latents", ignore_errors=True)
            with file_size(limit):
                line = outcome(workspace, stage, capsys)
            num_refused += bool(line)
            assert not line or line.endswith(
                ": File too large; raise the limit on file sizes (ulimit -f), or choose another disk"
            )
            print(stage, limit, line)
            left = written(workspace)
            assert left.items() <= through.items(), sorted(set(left.items()) - through.items())
        assert num_refused
        workspace.run(stage)
        assert written(workspace) == through
