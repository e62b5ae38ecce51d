"""SHA-256 of large files, kept in the state directory, so that each file is read once in its life.

A digest is kept under the file's device and inode, and used again while size and times are the same. As in git's
index, the digest of a file that changed just before it was read is not kept: a second change in the same tick of the
clock would leave size and times unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from lora_dag.core.files import from_json, state_dir, write_json
from lora_dag.core.progress import ByteBar

TICK = 2 * 10**9
"""Nanoseconds: the resolution of the coarsest file times in use, those of FAT."""
CHUNK = 16 * 2**20  # bytes


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file; only files without a kept digest are read, with progress.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    states = {path: path.stat() for path in paths}
    found = {path: kept(status) for path, status in states.items()}
    missing = [path for path, digest in found.items() if digest is None]
    if missing:
        with ByteBar("hash", sum(states[path].st_size for path in missing)) as bar:
            found |= {path: read_digest(path, bar) for path in missing}
    return {path: str(digest) for path, digest in found.items()}


def read_digest(path: Path, bar: ByteBar) -> str:
    """Return the SHA-256 of a file and keep it, unless the file changed shortly before or meanwhile."""
    start, total = time.time_ns(), hashlib.sha256()
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        while chunk := file.read(CHUNK):
            total.update(chunk)
            bar.add_bytes(len(chunk))
        after = os.fstat(file.fileno())
    if identity(before) == identity(after) and start - max(before.st_mtime_ns, before.st_ctime_ns) > TICK:
        with contextlib.suppress(OSError):  # such as a full disk: the file is read again next time
            write_json(record(after), {"file": identity(after), "sha256": total.hexdigest()})
    return total.hexdigest()


def kept(status: os.stat_result) -> str | None:
    """Return the kept digest of a file with this status; None if there is none or the file has changed."""
    try:
        content = from_json(record(status).read_text(encoding="utf-8"))
        return str(content["sha256"]) if content["file"] == identity(status) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record(status: os.stat_result) -> Path:
    """Return the path of the kept digest of a file with this status."""
    return state_dir() / "digests" / f"{status.st_dev}-{status.st_ino}.json"


def identity(status: os.stat_result) -> list[int]:
    """Return the values that change with a file: inode, size, and its times in nanoseconds.

    The time of the last change of the inode counts for writable files only: every new hard link to a read-only file in
    DVC's cache sets it.
    """
    is_writable = status.st_mode & 0o222
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns if is_writable else 0]
