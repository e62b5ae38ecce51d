"""The command line that every stage shares: ``--set``, artifact paths, logging, errors a person can cause.

``run(main)`` is the last line of a stage: it turns UserError into lines on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
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

from lora_dag.core import clone

log = logging.getLogger("lora-dag")

# Where dvc.yaml puts each artifact; Snakemake passes other places.
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


# What a machine or a person did to a path: never our fault, and the path says enough.
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another disk",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOTDIR: "remove or rename what stands in the place of a folder",
    errno.EEXIST: "remove or rename what stands in the place of a folder",
    errno.EISDIR: "remove or rename the folder that stands in the place of a file",
    errno.ELOOP: "remove the link",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "check the disk or network drive, and run again",
    errno.ESTALE: "check the disk or network drive, and run again",
}
LONGEST_LINE = 1000  # characters of a problem; what was got may be a list of thousands
CPU_ALLOCATOR = "DefaultCPUAllocator: "  # before what torch says where memory is short


class UserError(Exception):
    """Input that a person can mend. One line per problem: where, what we got, what we accept, what to do."""

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))


def one_line(text: str) -> str:
    """Printable: a value that we quote may hold ends of lines, and anything else that moves a terminal's cursor."""
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 caption``, ``2,000 captions``; the words may hold a verb: ``plural(1, "caption has", "captions have")``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def as_path(text: str) -> Path:
    """Of an argument, ``~`` expanded: a shell leaves it alone behind ``=`` and inside of quotes.

    Absolute where the current folder is below a clone's root: ``lora-dag`` works in the root.
    """
    path, here = Path(os.path.expanduser(text)), Path.cwd()
    return path if clone.find(here) in (here, None) else path.absolute()


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """Named as a person starts it; for a package, Python's own guess is ``__main__.py``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser(description: str | None, paths: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The parser of a stage."""
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

    141, and not a word, where the reader of the output has gone, as ``head`` does after its ten lines.

    Args:
        kept: what Ctrl-C leaves for the next run, where the KeyboardInterrupt itself has no text that says more.
    """
    logging.basicConfig(format="%(message)s", handlers=[Lines(sys.stdout)])
    log.setLevel("INFO")
    listen()
    try:
        try:
            ended(main, kept)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        sys.exit(128 + 13)  # as where SIGPIPE ends a program


def ended(main: Callable[[], None], kept: str) -> None:
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):
            said = str(error) if isinstance(error, KeyboardInterrupt) and str(error) else kept
            leave(
                f"{said}; the same command resumes" if said else "no file is half-written; run the same command again"
            )
        problems = error.problems if isinstance(error, UserError) else (machine_fault(error),)
        if not any(problems):
            raise
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def leave(what: str) -> NoReturn:
    """Exit as a process does that died of Ctrl-C, with one line: DVC and Snakemake see that nothing was finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would break the line
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C on its last line
    print(f"{start}stopped by Ctrl-C: {what}", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


interrupts: list[int] = []
"""Filled by Ctrl-C: packages in C and Rust turn a KeyboardInterrupt into exceptions of their own."""


def listen() -> None:
    """From here on Ctrl-C ends this process by ``leave``; not where it is ignored, as in a background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
        sys.excepthook = on_uncaught


def on_interrupt(number: int, frame: FrameType | None) -> None:
    interrupts.append(number)
    raise KeyboardInterrupt


def on_uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Ctrl-C while a stage still imports its packages, which takes seconds, leaves no traceback."""
    if interrupts:
        leave("nothing was written yet; run the same command again")
    sys.__excepthook__(kind, error, at)


class Lines(logging.StreamHandler[TextIO]):
    """The log on a stream; logging's own would print a traceback for each line where nobody reads any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            raise error
        super().handleError(record)


def reader_has_gone() -> bool:
    """Of stdout or stderr, and not that of a socket; what is left for them goes nowhere, also at the end."""
    gone = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return gone


def machine_fault(error: BaseException) -> str:
    """What a disk or the memory refused, and what to do; empty for what is our fault."""
    refused = refusal(error)
    if refused and refused.errno in REMEDIES:
        path = refused.filename2 or refused.filename  # of a rename, the second is the one that a person knows
        return f"{f'{path}: ' if path else ''}{refused.strerror}; {REMEDIES[refused.errno]}"
    if isinstance(error, MemoryError):
        return f"{str(error) or 'out of memory'}; end other programs, or use a machine with more of it"
    text = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError" or CPU_ALLOCATOR in text:  # torch's, without importing torch
        cure = (
            "lower the stage's batch_size; in train, raise gradient_accumulation_steps, or set gradient_checkpointing"
        )
        return f"{text.rpartition(CPU_ALLOCATOR)[2].rstrip('.')}; {cure}"
    return ""


def refusal(error: BaseException) -> OSError | None:
    """The system's own error; safetensors says it as text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
