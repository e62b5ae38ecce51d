"""The command line that all stages share: ``--set``, artifact paths, logging, errors that a user can correct.

``run(main)`` is the last line of a stage: it turns UserError into lines on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from lora_dag.core import clone, terminal
from lora_dag.core.help_text import HelpFormatter

log = logging.getLogger("lora-dag")

# Paths of the artifacts in dvc.yaml; Snakemake passes others.
PATHS = {
    "prepared": "data/prepared",
    "latents": "data/latents",
    "adapter": "data/adapter",
    "export": "data/export",
    "dataset_reports": "reports/dataset",
    "latents_reports": "reports/latents",
    "train_reports": "reports/train",
    "export_reports": "reports/export",
    "reports": "reports",
}


LONGEST_LINE = 1000  # characters of a problem; the value in it may be a list of thousands
RAW_BYTES = re.compile(r"((?:\\x[0-9a-f]{2}){8})(?:\\x[0-9a-f]{2})+")  # of a binary file: the first few are enough
RESUME, AGAIN = "Run the same command to resume.", "Run the same command again."
CPU_ALLOCATOR = "DefaultCPUAllocator: "  # before what torch says where memory is short


class Problem(str):
    """One line about an input that a person can correct: where, what was found, what is expected, what to do.

    Attributes:
        code: identity of the problem, such as ``unknown-setting``. It is printed behind the text. Tests check the
            code, the place and the suggested value; tests/messages.txt has all texts.
    """

    code: str

    def __new__(cls, code: str, text: str) -> Problem:
        problem = super().__new__(cls, one_line(text))
        problem.code = code
        return problem

    def at(self, place: str, glue: str = ": ") -> Problem:
        """Return the same problem with ``place`` before its text."""
        return Problem(self.code, f"{place}{glue}{self}")

    def about(self, subject: str) -> Problem:
        """Return the same problem, whose text is a predicate, with its subject, such as the name of an image."""
        return Problem(self.code, f"{subject} {self}")


class UserError(Exception):
    """Raised for input that a person can correct. ``run`` prints one line per problem and exits with code 2."""

    def __init__(self, *problems: Problem) -> None:
        if uncoded := [problem for problem in problems if not isinstance(problem, Problem)]:
            raise TypeError(f"a Problem with a code is expected, got {uncoded[0]!r}")
        self.problems = problems
        super().__init__("\n".join(self.problems))

    def at(self, place: str) -> UserError:
        """Return the same error with ``place`` before each problem."""
        return UserError(*(problem.at(place) for problem in self.problems))

    def about(self, subject: str) -> UserError:
        """Return the same error with ``subject`` before each problem, whose text is a predicate."""
        return UserError(*(problem.about(subject) for problem in self.problems))

    @property
    def codes(self) -> tuple[str, ...]:
        """Code of each problem."""
        return tuple(problem.code for problem in self.problems)


def warn(code: str, text: str) -> None:
    """Log a warning with its code, as errors have one."""
    log.warning("warning: %s [%s]", one_line(text), code)


def one_line(text: str) -> str:
    """Return the text in one printable line of limited length, with escapes for what moves a terminal's cursor."""
    text = text[: LONGEST_LINE * 2] + text[LONGEST_LINE * 2 :][-LONGEST_LINE:]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    text = RAW_BYTES.sub(r"\1...", text)
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 3 :]}"
    return text


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return ``1 caption`` or ``2,000 captions``; with a verb: ``plural(1, "caption has", "captions have")``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def as_path(text: str) -> Path:
    """Return the path of an argument with ``~`` expanded, which a shell does not do after ``=`` and in quotes.

    The path is absolute if the current folder is below a clone's root, as ``lora-dag`` changes into the root.
    """
    path, here = Path(os.path.expanduser(text)), Path.cwd()
    return path if clone.find(here) in (here, None) else path.absolute()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=2) if unknown else []
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UserError(Problem("wrong-arguments", f"{self.prog}: {message}{hint}. Read `{self.prog} --help`."))


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that is named as a person starts it; for a package, Python's own guess is ``__main__.py``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return Parser(prog=name, description=description, formatter_class=HelpFormatter)


def parser(description: str | None, paths: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a stage."""
    result = bare_parser(description)
    add_settings(result, paths)
    return result


def add_settings(parser: argparse.ArgumentParser, paths: Iterable[str] = ()) -> None:
    """Add ``--params``, ``--set`` and one ``--NAME DIR`` per artifact that is read or written."""
    parser.add_argument("--params", type=as_path, default=Path("params.yaml"), metavar="FILE")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a parameter, as in `dvc exp run -S`",
    )
    for name in paths:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=as_path, default=Path(PATHS[name]), metavar="DIR", help=f"(default: {PATHS[name]})"
        )


def run(main: Callable[[], None], kept: str = "") -> None:
    """Run a stage: exit code 0 done, 2 the user's input (one line each on stderr), 1 our fault (traceback), 130 Ctrl-C.

    Exit code 141 without a message if the reader of the output has closed it, as ``head`` does after ten lines.

    Args:
        kept: results that the next run reuses after Ctrl-C; a text of the KeyboardInterrupt itself replaces it.
    """
    handler = LogHandler(sys.stdout)
    handler.setFormatter(terminal.Formatter(sys.stdout))
    logging.basicConfig(handlers=[handler])
    log.setLevel("INFO")
    handle_interrupts()
    try:
        try:
            run_main(main, kept)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        sys.exit(128 + 13)  # as if SIGPIPE had ended the program


def run_main(main: Callable[[], None], kept: str) -> None:
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):
            progress = str(error) if isinstance(error, KeyboardInterrupt) and str(error) else kept
            exit_interrupted(f"{progress}. {RESUME}" if progress else f"no file is half-written. {AGAIN}")
        problems = error.problems if isinstance(error, UserError) else tuple(filter(None, [machine_fault(error)]))
        if not problems:
            raise
        for problem in problems:
            terminal.write_line(f"error: {problem} [{problem.code}]")
        sys.exit(2)


def exit_interrupted(text: str) -> NoReturn:
    """Print one line and exit with the code of Ctrl-C, so that DVC and Snakemake know that the stage is unfinished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would break the line
    if sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal has written ^C on its last line
    terminal.write_line(f"stopped by Ctrl-C: {text}")
    sys.exit(128 + signal.SIGINT)


interrupts: list[int] = []
"""Filled by Ctrl-C, as packages in C and Rust turn a KeyboardInterrupt into other exceptions."""


def handle_interrupts() -> None:
    """Let Ctrl-C end this process by ``exit_interrupted``, unless it is ignored, as in a background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
        sys.excepthook = on_uncaught


def on_interrupt(number: int, frame: FrameType | None) -> None:
    interrupts.append(number)
    raise KeyboardInterrupt


def on_uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Print no traceback for Ctrl-C while a stage imports its packages, which takes seconds."""
    if interrupts:
        exit_interrupted(f"nothing was written yet. {AGAIN}")
    sys.__excepthook__(kind, error, at)


class LogHandler(logging.StreamHandler[TextIO]):
    """Log handler of a stream that raises BrokenPipeError; logging's own prints a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            raise error
        super().handleError(record)


def reader_has_gone() -> bool:
    """Return whether the reader of stdout or stderr has closed it; further output is discarded."""
    gone = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


_FULL = Problem("disk-full", "Free some space.")
_PERMISSION = Problem("no-permission", "Change its permissions.")
_NO_FOLDER = Problem("path-occupied", "Remove or rename the file that has the folder's name.")
_DISK = Problem("disk-error", "Check the disk or network drive, and run again.")
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: Problem("file-size-limit", "Raise the limit on file sizes (ulimit -f), or choose another disk."),
    errno.EROFS: Problem("disk-read-only", "Choose a folder that can be written."),
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: Problem("path-occupied", "Remove or rename the folder that has the file's name."),
    errno.ELOOP: Problem("link-loop", "Remove the link."),
    errno.ENAMETOOLONG: Problem("name-too-long", "Use a shorter name."),
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}
"""Error numbers that a machine or a person causes, never our code: the code of the problem and what to do."""


def machine_fault(error: BaseException) -> Problem | None:
    """Return the problem of a disk or of memory that is short; None where the fault is ours."""
    system_error = as_os_error(error)
    if system_error and system_error.errno in REMEDIES:
        path = system_error.filename2 or system_error.filename  # of a rename, the second is the one that a person knows
        remedy = REMEDIES[system_error.errno]
        return Problem(remedy.code, f"{f'{path}: ' if path else ''}{system_error.strerror}. {remedy}")
    if isinstance(error, MemoryError):
        cause = str(error) or "out of memory"
        return Problem("out-of-memory", f"{cause}. End other programs, or use a machine with more memory.")
    text = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError" or CPU_ALLOCATOR in text:  # torch's, without importing torch
        cause = text.rpartition(CPU_ALLOCATOR)[2].rstrip(".")
        in_train = "In train, raise gradient_accumulation_steps or set gradient_checkpointing."
        return Problem("out-of-memory", f"{cause}. Lower the stage's batch_size. {in_train}")
    return None


def as_os_error(error: BaseException) -> OSError | None:
    """Return the operating system's error; safetensors reports it as text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
