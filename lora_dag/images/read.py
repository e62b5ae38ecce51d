"""Reading image files by their name in a folder. Only regular files are opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lora_dag.core.console import Problem, UserError

MAX_BYTES = 512 * 2**20
"""Largest image file: MAX_PIXELS of checks.py without compression (RGB, 16 bits) have 480 MB."""
NO_FILE = (errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors when opening a socket, a link to itself or an impossible name. Any other error is the machine's fault."""

ReadImage = Callable[[str], bytes]
"""Function from a file name to the file's bytes."""


def image_reader(source: str | Path) -> ReadImage:
    """Return a function that reads an image or mask below a folder by ``Item.file_name`` or ``Item.mask``.

    Threads may share it. It raises UserError for a file that is missing, not regular, or too large to be an image.
    """

    def read(file_name: str) -> bytes:
        if os.path.isabs(file_name) or ".." in PurePosixPath(file_name).parts:
            raise UserError(
                Problem(
                    "file-outside-source",
                    f"'{file_name}' is outside of dataset.source. Run `python -m stages.prepare` again.",
                )
            )
        return read_regular(Path(source) / file_name, file_name)

    return read


def read_regular(path: Path, name: str, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Args:
        name: the file's name in messages.
        limit: largest size in bytes.

    Raises:
        UserError: the file is missing, is not a regular file, or has more than ``limit`` bytes.
        OSError: the machine cannot read it. The error has the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, a FIFO would wait for its writer
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            Problem("file-missing", f"'{name}' no longer exists. Restore it, or run `python -m stages.prepare` again.")
        ) from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise UserError(
            Problem("file-not-regular", f"'{name}' cannot be opened ({error.strerror}). Replace it by a regular file.")
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(Problem("file-not-regular", f"'{name}' is not a regular file. Replace it by one."))
        require_size(status.st_size, name, limit)
        with errors_with_path(path), open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


@contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Add the path to an OSError of reading an open file, which has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def require_size(num_bytes: int, name: str, limit: int = MAX_BYTES) -> None:
    """Raise UserError for a file of more than ``limit`` bytes."""
    if num_bytes > limit:
        fix = "Scale the image down." if limit == MAX_BYTES else "Shorten or split the file."
        text = f"'{name}' has {num_bytes:,} bytes, but at most {limit:,} are read. {fix}"
        raise UserError(Problem("file-too-large", text))
