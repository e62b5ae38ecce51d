"""Output on a terminal of a given width, and in a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lora_dag.core import terminal
from tests.helpers.workspace import REPOSITORY, Workspace

LONG = "error: params.yaml lora.rank: got 'eight', but an integer is expected. Write lora.rank: 8. [wrong-value]"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_screen(columns: int, *command: str, interrupt_after: str = "", **environment: str) -> str:
    """Return what a process writes on a new pseudo-terminal.

    Args:
        interrupt_after: text after which Ctrl-C is pressed.
    """
    own, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}

    def restore_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it

    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
        env=variables | {"TERM": "xterm"} | environment,
        preexec_fn=restore_interrupts,
    )
    os.close(other)
    output = b""
    try:
        while chunk := os.read(own, 4096):
            output += chunk
            if interrupt_after and interrupt_after.encode() in output:
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
                interrupt_after = ""
    except OSError:  # Linux: the last process has closed the terminal
        pass
    process.wait(timeout=60)
    os.close(own)
    return output.decode().replace("\r\n", "\n")


def without_color(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_lines_break_between_words_under_the_text(columns: int) -> None:
    for line, indent in ((LONG, len("error: ")), ("device      " + "word " * 60 + "end", 12), ("a b " * 60 + "c", 2)):
        rows = terminal.wrap(line, columns).split("\n")
        assert all(len(row) <= columns for row in rows)
        assert all(re.match(" *", row)[0] == " " * indent for row in rows[1:])  # type: ignore[index]
        assert " ".join(row.strip() for row in rows).split() == line.split()


def test_command_and_path_stay_in_one_piece() -> None:
    command = "`dvc exp run -S lora.rank=16 --name rank-16`"
    text = f"error: data/a: no such folder. Write its name, or run {command} to see what happens [no-folder]"
    assert command in terminal.wrap(text, 60)
    following = "next        git add params.yaml dvc.lock reports && git commit -m 'a message'"
    assert terminal.wrap(following, 50) == following
    path = "wrote       " + "folder/" * 20
    assert terminal.wrap(path, 80) == path


def test_wide_characters_take_two_columns() -> None:
    rows = terminal.wrap("images      " + "画像 " * 30, 60).split("\n")
    assert [terminal.num_columns(row) <= 60 for row in rows] == [True] * len(rows) and len(rows) > 2


def test_tables_of_a_page_are_not_wrapped() -> None:
    row = "| a | " + "value " * 40 + "|"
    assert row in without_color(terminal.layout(f"# Title\n\n{row}\n" + "prose " * 40, Screen())).split("\n")


def test_pipe_gets_one_plain_line() -> None:
    assert terminal.layout(LONG, io.StringIO()) == LONG


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_color_can_be_turned_off(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31merror:\x1b[0m" in terminal.layout(LONG, Screen())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "\x1b" not in terminal.layout(LONG, Screen())


@pytest.mark.parametrize("columns", [80, 200])
def test_command_on_a_terminal(columns: int, workspace: Workspace) -> None:
    output = on_screen(columns, "-m", "tests.helpers.command", "check", "--set", "lora.rank=eight")
    assert "\x1b[1;31merror:\x1b[0m" in output
    lines = without_color(output).splitlines()
    assert "".join(lines).endswith("[wrong-value]") and all(len(line) <= columns for line in lines)
    output = on_screen(columns, "-m", "stages.prepare")
    assert all(len(line) <= columns or " " not in line[12:] for line in without_color(output).splitlines())
    plain = workspace.process("prepare").stdout
    assert "\x1b" not in plain and "next        " in plain


def test_ctrl_c_on_a_terminal_has_a_line_of_its_own(tmp_path: Path) -> None:
    work = "print('at work', end='', flush=True), time.sleep(60)"
    code = f"import time; from lora_dag.core import console; console.run(lambda: ({work}), kept='step 2 is kept')"
    output = on_screen(60, "-c", code, interrupt_after="at work", PYTHONPATH=str(REPOSITORY))
    lines = without_color(output).splitlines()
    assert lines[1] == "stopped by Ctrl-C: step 2 is kept. Run the same command to"
    assert lines[2].strip() == "resume."
