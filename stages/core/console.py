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
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

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


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """Named as a person starts it; for a package, Python's own guess is ``__main__.py``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def as_path(text: str) -> Path:
    """Of an argument, ``~`` expanded: a shell leaves it alone behind ``=`` and inside of quotes."""
    return Path(os.path.expanduser(text))


def parser(description: str | None, paths: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The stage's parser: ``--params``, ``--set`` and one ``--NAME DIR`` per artifact that it reads or writes."""
    result = bare_parser(description)
    result.add_argument("--params", type=as_path, default=Path("params.yaml"), metavar="FILE")
    result.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a parameter, as in `dvc exp run -S`",
    )
    for name in paths:
        flag = "--" + name.replace("_", "-")
        result.add_argument(
            flag, type=as_path, default=Path(PATHS[name]), metavar="DIR", help=f"(default: {PATHS[name]})"
        )
    return result


def run(main: Callable[[], None]) -> None:
    """Run a stage: exit code 0 done, 2 the user's input (one line each on stderr), 1 our fault (traceback).

    141, and not a word, where the reader of the output has gone, as ``head`` does after its ten lines.
    """
    logging.basicConfig(format="%(message)s", handlers=[Lines(sys.stdout)])
    log.setLevel("INFO")
    try:
        try:
            ended(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        sys.exit(128 + 13)  # as where SIGPIPE ends a program


def ended(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        problem = machine_fault(error)
        if not problem:
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


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


def machine_fault(error: Exception) -> str:
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


def refusal(error: Exception) -> OSError | None:
    """The system's own error; safetensors says it as text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
