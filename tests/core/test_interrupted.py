"""Ctrl-C in every stage: one line that says what is kept, exit code 130, nothing half-written, and the same end."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_dag.core import console, params
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import replaced
from tests.helpers.forked import exit_code
from tests.helpers.workspace import REPOSITORY, Workspace

STOPPED, RESUMES = "stopped by Ctrl-C: ", "Run the same command to resume."
MOMENTS = [
    ("prepare", "stages.prepare.inspection", "Inspector", "examine", 4, (STOPPED, RESUMES)),
    ("cache_latents", "lora_dag.artifacts.store", "Store", "save", 5, (STOPPED, "batch", RESUMES)),
    ("train", "stages.train.loop", "", "check_step_zero", 1, (STOPPED, "checkpoint", RESUMES)),
    ("train", "stages.train.loop", "", "training_step", 3, (STOPPED, "step 3", RESUMES)),
    ("train", "stages.train.results", "", "save_adapter", 1, (STOPPED, "step 2", RESUMES)),
    ("validate", "stages.validate.score_snapshots", "", "row_losses", 2, (STOPPED, RESUMES)),
    ("export", "stages.export.parity", "ParityCheck", "check", 2, (STOPPED, RESUMES)),
    ("report", "stages.report.page", "", "write_page", 1, (STOPPED, RESUMES)),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """A folder where all six stages ran, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "here"
    shutil.copytree(reference, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_STATE_DIR", str(folder / ".state"))
        for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
            patch.setattr(sys, "argv", [stage])
            importlib.import_module(f"stages.{stage}.__main__").main()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Outputs and reports, but for what differs between equal runs."""
    paths = [path for name in ("data", "reports") for path in (folder / name).rglob("*") if path.is_file()]
    own = ("run.json", "report.html")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name not in own}


@pytest.fixture
def begun(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, with a state directory that remembers nothing."""
    folder = tmp_path / "begun"
    shutil.copytree(finished, folder, symlinks=True, ignore=shutil.ignore_patterns(".state"))
    monkeypatch.setenv("LORA_STATE_DIR", str(folder / ".state"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(folder)
    return folder


def stopped_at(holder: Any, name: str, number: int, module: str, *argv: str) -> str:
    """Return the stderr of a module's process that gets SIGINT at a call of a function and exits with 130."""
    original, calls, errors = getattr(holder, name), [], Path("stderr.txt")

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
        setattr(holder, name, broken)
        sys.argv = [module, *argv]
        with errors.open("w") as sys.stderr:
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as ended:
                assert ended.code == 130

    assert exit_code(work) == 0
    said = errors.read_text()
    errors.unlink()
    return said


@pytest.mark.parametrize(("stage", "module", "owner", "name", "number", "parts"), MOMENTS)
def test_ctrl_c_ends_a_stage_in_one_line_and_the_same_command_resumes(
    begun: Path,
    finished: Path,
    stage: str,
    module: str,
    owner: str,
    name: str,
    number: int,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = importlib.import_module(module)
    output = stopped_at(getattr(holder, owner) if owner else holder, name, number, f"stages.{stage}")
    assert output.count("\n") == 1 and output.startswith(parts[0]) and all(part in output for part in parts)
    assert [path for path in begun.rglob(".*") if path.name != ".state"] == []  # no temporary file or folder
    if stage == "export":
        assert files(begun) == files(finished)
    monkeypatch.setattr(sys, "argv", [stage])
    importlib.import_module(f"stages.{stage}.__main__").main()
    assert files(begun) == files(finished)


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it

    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listen,
    )


def test_ctrl_c_while_packages_are_imported(begun: Path) -> None:
    code = "from lora_dag.core import console; console.handle_interrupts(); import os; os.kill(os.getpid(), 2)"
    with start(begun, "-c", code) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1 and errors.startswith(f"{STOPPED}nothing was written")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("library", ["pydantic_core", "libtorch_cpu"])
def test_ctrl_c_from_outside_while_a_stage_imports(begun: Path, library: str) -> None:
    """In the middle of Python's own packages, and of torch, which takes seconds."""
    with start(begun, "-m", "stages.validate") as process:
        while library not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    *before, last = errors.splitlines()
    assert last.startswith(STOPPED) and "Traceback" not in errors
    assert not before or "panicked" in errors  # pyo3 itself prints where its import was interrupted


def test_ctrl_c_in_another_command(workspace: Workspace) -> None:
    output = stopped_at(params, "read_with_overrides", 1, "tests.helpers.command", "check")
    assert output.count("\n") == 1 and output.startswith(STOPPED) and "Run the same command again." in output


def test_ctrl_c_that_a_package_takes_for_another_fault(tmp_path: Path) -> None:
    """Such as the import of a module in Rust, which panics."""
    said = tmp_path / "said"

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise UserError(Problem("file-damaged", "damaged. Fetch it again.")) from None

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with said.open("w") as sys.stderr, pytest.raises(SystemExit, match="130"):
            console.run(main, kept="all is kept")

    assert exit_code(work) == 0
    assert said.read_text() == f"{STOPPED}all is kept. {RESUMES}\n"


def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ctrl-C comes between the two renames."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "old").touch()
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name == ".export.new":
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), replaced(folder) as aside:
        (aside / "new").touch()
    assert os.listdir(tmp_path) == ["export"] and os.listdir(folder) == ["old"]
    monkeypatch.undo()
    with replaced(folder) as aside:
        (aside / "new").touch()
    assert os.listdir(tmp_path) == ["export"] and os.listdir(folder) == ["new"]


def test_what_a_killed_run_left_beside_a_folder_stops_no_run(tmp_path: Path) -> None:
    """Killed after both renames, before the old folder was deleted."""
    folder, before = tmp_path / "export", tmp_path / ".export.old"
    for path in (folder, before):
        path.mkdir()
        (path / "old").touch()
    with replaced(folder) as aside:
        (aside / "new").touch()
    assert os.listdir(tmp_path) == ["export"] and os.listdir(folder) == ["new"]
