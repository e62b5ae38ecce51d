"""Disks that refuse, memory that is short, folders that two want: one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lora_dag.core import console
from lora_dag.core.locks import last_holder
from lora_dag.core.tensors import save_tensors
from stages.train import parent_processes, results
from stages.train.parent_processes import parent_pids
from stages.train.run import Run
from tests.helpers.errors import assert_line
from tests.helpers.workspace import Workspace, outcome

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


def written(workspace: Workspace) -> dict[str, bytes]:
    """All outputs, but for what differs between equal runs."""
    found = {f"{folder}/{name}": blob for folder in OUTPUTS for name, blob in workspace.tree(folder).items()}
    return {name: blob for name, blob in found.items() if not name.endswith(("run.json", "report.html"))}


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
            assert not line or ": File too large. " in line and line.endswith("[file-size-limit]")
            print(stage, limit, line)
            left = written(workspace)
            assert left.items() <= through.items(), sorted(set(left.items()) - through.items())
        assert num_refused
        workspace.run(stage)
        assert written(workspace) == through


# Cheap ones, without a whole DAG


def test_disk_errors_of_safetensors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(2)})
    before = path.read_bytes()
    with file_size(1000), pytest.raises(OSError, match="File too large") as caught:
        save_tensors(path, {"a": torch.zeros(2000)})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@ROOT
@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [("size=64k", "disk-full", "No space left on device"), ("ro", "disk-read-only", "Read-only file system")],
)
def test_a_disk_of_its_own(
    tmp_path: Path, options: str, code: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk" / "a.safetensors"
    path.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path.parent], check=True)
    try:
        with pytest.raises(SystemExit) as caught:
            console.run(lambda: save_tensors(path, {"a": torch.zeros(100_000)}))
        assert not list(path.parent.iterdir())
    finally:
        subprocess.run(["umount", path.parent], check=True)
    assert caught.value.code == 2
    assert_line(capsys.readouterr().err, code, f"error: {path}: {reason}")


@pytest.mark.parametrize(
    "make", [lambda: torch.empty(10**15), lambda: fail(torch.OutOfMemoryError("CUDA out of memory."))]
)
def test_out_of_memory_names_the_settings_to_lower(
    make: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        console.run(lambda: make() and None)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and "enforce" not in line
    assert line.startswith(("error: can't allocate memory: you tried to allocate 4000", "error: CUDA out of memory. "))
    assert_line(line, "out-of-memory", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def fail(error: Exception) -> None:
    raise error


# Trainings

HOLD = """
from pathlib import Path
from lora_dag.core.locks import writing
with writing(Path("data/adapter")):
    input()
"""


def test_two_trainings_into_one_folder(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """They may be of other parameters: the later one to end would leave its adapter under the other's reports."""
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as holder:
        while not [path for path in Path(".state").glob("writing/*") if last_holder(path)[0] == str(holder.pid)]:
            assert holder.poll() is None
        line = outcome(workspace, "train", capsys)
        holder.communicate(b"\n")
    assert_line(line, "folder-locked", "data/adapter", f"process {holder.pid}", f"`kill {holder.pid}`")


def test_a_run_taken_over_from_another_machine_is_left_to_it(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network disk without locks; here another name in the lock file."""
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    save = Run.save_weights

    def taken_over(run: Run, path: Path) -> None:
        save(run, path)
        (run.identity.folder / "lock").write_text("7 node-b")

    monkeypatch.setattr(Run, "save_weights", taken_over)
    line = outcome(workspace, "train", capsys)
    assert_line(line, "run-taken-over", "process 7", "node-b")
    assert not Path("data/adapter").exists()


def test_a_run_that_another_machine_has_ended_is_one_line(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshots are gone just before they would be copied; the adapter that is there stays."""
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    Path("data/adapter").mkdir()
    Path("data/adapter/mine").touch()
    monkeypatch.setattr(results, "require_held", lambda folder: shutil.rmtree(folder / "snapshots"))
    line = outcome(workspace, "train", capsys)
    assert line.startswith("error: ") and "step 2" in line
    assert Path("data/adapter/mine").exists()


def test_temporary_files_of_a_killed_write_are_deleted(workspace: Workspace) -> None:
    constant = ("--set", "train.lr_scheduler=constant")
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    workspace.run("train", *constant)
    (snapshots,) = Path(".state/runs").glob("*/snapshots")
    for name in ("snapshots/.step-2.x1", "checkpoints/.step-000004.pt.x1"):
        (snapshots.parent / name).write_bytes(b"half")
    workspace.run("train", *constant)
    assert not list(snapshots.parent.rglob(".*")) and len(list(snapshots.iterdir())) == 1


def test_an_orphan_keeps_its_last_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell outlives Snakemake and stands between: not the parent, but one above it has changed."""
    for stage in ("prepare", "cache_latents"):
        workspace.run(stage)
    workspace.run("train")
    whole = workspace.tree("data/adapter")
    assert not list(Path(".state/runs").glob("*/checkpoints"))
    seen = [parent_pids()]
    with monkeypatch.context() as patch:
        patch.setattr(parent_processes, "parent_pids", lambda: seen.pop() if seen else [os.getppid(), 1])
        workspace.run("train")
    assert list(Path(".state/runs").glob("*/checkpoints/step-000004.pt"))
    assert "resumed from step 4" in workspace.run("train") and workspace.tree("data/adapter") == whole
    assert not list(Path(".state/runs").glob("*/checkpoints"))


def test_parent_pids_equal_those_of_ps() -> None:
    found, pid = [], os.getpid()
    while pid > 1:
        pid = int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True).stdout)
        found.append(pid)
    assert parent_pids() == found
