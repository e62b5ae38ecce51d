"""Faults of the machine or the user are one line and exit code 2; our own faults are a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from lora_dag.commands import COMMANDS, STAGES
from lora_dag.core.console import Problem, UserError, parser, plural, run
from lora_dag.core.files import state_dir
from tests.helpers.errors import assert_line
from tests.helpers.workspace import REPOSITORY, Workspace


def stderr_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code_and_values"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x"), ("disk-full", "error: /x: No space left", "Free some space.")),
        (OSError(errno.EIO, "Input/output error", "/mnt/a.png"), ("disk-error", "/mnt/a.png: Input/output error")),
        (OSError(errno.ESTALE, "Stale file handle"), ("disk-error", "error: Stale file handle")),
        (MemoryError(), ("out-of-memory", "error: out of memory")),
        (MemoryError("out of memory while 'a.tif' was decoded"), ("out-of-memory", "while 'a.tif' was decoded")),
    ],
)
def test_machine_fault_is_one_line(
    error: BaseException, code_and_values: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = stderr_of(error, capsys)
    assert lines.count("\n") == 1
    assert_line(lines, *code_and_values)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got 'a\nb\x1b[2K\ud800'", "got 'a\\nb\\x1b[2K\\ud800'"),
        (f"got {'9' * 5000}. Correct it.", f"got {'9' * 496} ... {'9' * 321}. Correct it."),
        ("got '" + "\x00" * 40 + "'", "got '" + "\\x00" * 8 + "...'"),
        ("got '" + "\x00" * 5000 + "'", "got '" + "\\x00" * 8 + "...'"),
    ],
)
def test_quoted_value_cannot_move_the_cursor_or_fill_the_screen(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stderr_of(UserError(Problem("a-code", text)), capsys) == f"error: {shown} [a-code]\n"


def test_each_problem_is_a_line_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError(Problem("first-code", "one"), Problem("second-code", "two").at("a.png"))
    assert stderr_of(error, capsys) == "error: one [first-code]\nerror: a.png: two [second-code]\n"


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("stages.train --parms x", ("python -m stages.train", "--parms", "near: --params", "--help")),
        ("lora_dag gc --force", ("lora-dag gc", "--force", "`lora-dag gc --help`")),
        ("lora_dag verify", ("lora-dag verify", "FILE")),
    ],
)
def test_wrong_argument_is_one_line(command: str, values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert_line(done.stderr, "wrong-arguments", *values)


@pytest.mark.parametrize("make", [lambda: OSError("no number"), lambda: ValueError("ours")])
def test_our_faults_have_a_traceback(make: Callable[[], Exception]) -> None:
    def main() -> None:
        raise make()

    with pytest.raises((OSError, ValueError)):
        run(main)


@pytest.mark.parametrize(("name", "started"), [("gate", "lora-dag gate"), ("train", "python -m stages.train")])
def test_help_names_the_command_as_it_is_started(workspace: Workspace, name: str, started: str) -> None:
    """Python's own guess for a package is ``__main__.py``."""
    assert workspace.process(name, "--help").stdout.startswith(f"usage: {started} [-h]")


SLOW = {"accelerate", "datasets", "diffusers", "pandas", "peft", "torch", "transformers"}
IMPORTED = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules))
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("name", STAGES)
def test_help_imports_nothing_that_is_slow(name: str) -> None:
    command = [sys.executable, "-c", IMPORTED, f"stages.{name}", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "pydantic" in imported and not imported & SLOW


def test_numbers_of_one_are_singular() -> None:
    assert plural(1, "caption") == "1 caption"
    assert plural(0, "caption") == "0 captions"
    assert plural(2500, "caption") == "2,500 captions"
    assert [plural(n, "caption has", "captions have") for n in (1, 2)] == ["1 caption has", "2 captions have"]


def to_a_reader_that_has_gone(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as in ``command | head -0`` with a fast head."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    "command", [*(f"stages.{name}" for name in STAGES), *(f"lora_dag {name}" for name in COMMANDS)]
)
def test_output_that_nobody_reads_ends_a_command_without_a_word(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    done = to_a_reader_that_has_gone(sys.executable, "-m", *command.split(), "--help")
    assert done.returncode in (0, 141) and done.stderr == ""  # argparse takes no notice of a longer text's end


def test_so_do_log_lines_in_the_middle_of_the_work(workspace: Workspace) -> None:
    done = to_a_reader_that_has_gone(sys.executable, "-m", "stages.prepare")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_outputs_is_our_fault(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        run(main)


WINDOWS = {
    "platform": "import sys; sys.platform = 'win32'",
    "no fcntl": "import sys; sys.modules['fcntl'] = None",
}


@pytest.mark.parametrize("way", WINDOWS)
@pytest.mark.parametrize(
    "command",
    [
        "stages.prepare",
        "stages.train",
        "lora_dag",
    ],
)
def test_on_windows_every_command_is_one_line(workspace: Workspace, command: str, way: str) -> None:
    """Nothing is imported before it: the package itself says so."""
    code = f"{WINDOWS[way]}; import runpy; runpy.run_module({command!r}, run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert_line(done.stderr, "unsupported-system", "`wsl --install`")


@pytest.mark.parametrize("command", ["stages.train", "lora_dag"])
@pytest.mark.parametrize(
    "fault",
    [
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; sys.path.insert(0, '.')",
        "import sys; sys.version_info = (3, 10, 13)",
    ],
    ids=["no-packages", "old-python"],
)
def test_without_the_virtual_environment_every_command_is_one_line(command: str, fault: str) -> None:
    code = f"{fault}; import runpy; runpy.run_module({command!r}, run_name='__main__', alter_sys=True)"
    start = [sys.executable, "-S", "-c", code]
    done = subprocess.run(start, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert_line(done.stderr, "packages-missing", sys.executable, "`. .venv/bin/activate`")


def test_a_tilde_in_an_argument_is_the_home_folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ``--params=~/x`` alone."""
    monkeypatch.setenv("HOME", str(workspace.path))
    parsed = parser("", ("adapter",)).parse_args(["--params=~/params.yaml", "--adapter=~/data/adapter"])
    assert (parsed.params, parsed.adapter) == (workspace.path / "params.yaml", workspace.path / "data/adapter")
    monkeypatch.setenv("LORA_STATE_DIR", "~/state")
    assert state_dir() == workspace.path / "state"
