"""An image's bytes by its name in a folder; nothing but a regular file is ever opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lora_dag.core.console import UserError

MAX_BYTES = 512 * 2**20
"""Of one image: the largest that ``checks.MAX_PIXELS`` admits has 480 MB without any compression (RGB, 16 bits)."""
NO_FILE = (errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of opening a socket, a link to itself or no possible name; any other is the machine's fault."""

Read = Callable[[str], bytes]
"""file_name -> the bytes"""


def reader(source: str | Path) -> Read:
    """Reads any image or mask below a folder by ``Item.file_name`` or ``Item.mask``; threads may share it.

    Raises:
        UserError: the file is gone, no regular file, or too large to be an image.
    """

    def read(file_name: str) -> bytes:
        if os.path.isabs(file_name) or ".." in PurePosixPath(file_name).parts:
            raise UserError(f"'{file_name}' leaves dataset.source; run `python -m stages.prepare` again")
        return read_regular(Path(source) / file_name, file_name)

    return read


def read_regular(path: Path, shown: str, limit: int = MAX_BYTES) -> bytes:
    """A regular file's bytes; ``shown`` names it in messages.

    Raises:
        UserError: it is gone, something else than a file, or has more than ``limit`` bytes.
        OSError: the machine cannot read it, with the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, a FIFO would wait for its writer
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{shown}' is no file any more; restore it, or run `python -m stages.prepare` again") from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise UserError(f"'{shown}' cannot be opened ({error.strerror}); expected a regular file") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"'{shown}' is not a regular file; replace it by one")
        refuse_huge(status.st_size, shown, limit)
        with located(path), open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Inside, an open file is read; what goes wrong with that names no path by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def refuse_huge(num_bytes: int, shown: str, limit: int = MAX_BYTES) -> None:
    if num_bytes > limit:
        cure = "more than any picture of allowed size has" if limit == MAX_BYTES else "so shorten or split it"
        raise UserError(f"'{shown}' has {num_bytes:,} bytes; at most {limit:,} are read, {cure}")
