"""What a machine or a person did is one line and exit code 2; what we did wrong is a traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from stages.core.console import UserError, plural, run
from tests.conftest import Workspace


def stderr_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("one; mend it", "two; mend it"), "error: one; mend it\nerror: two; mend it\n"),
        (UserError("got 'a\nb\x1b[2K\ud800'"), "error: got 'a\\nb\\x1b[2K\\ud800'\n"),
        (UserError(f"got {'9' * 5000}; mend it"), f"error: got {'9' * 496} ... {'9' * 325}; mend it\n"),
        (OSError(errno.ENOSPC, "No space left", "/x"), "error: /x: No space left; free some space\n"),
        (
            OSError(errno.EIO, "Input/output error", "/mnt/a.png"),
            "error: /mnt/a.png: Input/output error; check the disk or network drive, and run again\n",
        ),
        (
            OSError(errno.ESTALE, "Stale file handle"),
            "error: Stale file handle; check the disk or network drive, and run again\n",
        ),
        (MemoryError(), "error: out of memory; end other programs, or use a machine with more of it\n"),
        (
            MemoryError("out of memory while 'a.tif' was decoded"),
            "error: out of memory while 'a.tif' was decoded; end other programs, or use a machine with more of it\n",
        ),
    ],
)
def test_the_machines_faults(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stderr_of(error, capsys) == said


@pytest.mark.parametrize("make", [lambda: OSError("no number"), lambda: ValueError("ours")])
def test_our_faults_have_a_traceback(make: Callable[[], Exception]) -> None:
    def main() -> None:
        raise make()

    with pytest.raises((OSError, ValueError)):
        run(main)


@pytest.mark.parametrize("stage", ["gate", "compare", "promote", "leaderboard"])
def test_help_names_the_command_as_it_is_started(workspace: Workspace, stage: str) -> None:
    """Of a package, Python's own guess is ``__main__.py``."""
    assert workspace.process(stage, "--help").stdout.startswith(f"usage: python -m stages.{stage} [-h]")


def test_numbers_of_one_are_singular() -> None:
    assert plural(1, "caption") == "1 caption"
    assert plural(0, "caption") == "0 captions"
    assert plural(2500, "caption") == "2,500 captions"
    assert [plural(n, "caption has", "captions have") for n in (1, 2)] == ["1 caption has", "2 captions have"]
