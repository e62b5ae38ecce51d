"""Locks on folders: one process at a time writes an output or continues a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_dag.core.console import Problem, UserError, log
from lora_dag.core.files import state_dir

UNKNOWN = "unknown"
THIS_PROCESS = secrets.token_hex(8)  # beside its number, which a container's may share


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold an output folder, so that two runs cannot leave a mix of both.

    Raises:
        UserError: another process is writing there; the message has its process id.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with lock(state_dir() / "writing" / name, shown_as=folder):
        yield


@contextlib.contextmanager
def lock(folder: Path, shown_as: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the kernel frees it when the process dies, however it dies.

    Args:
        shown_as: folder to name in the messages instead.
        wait: wait for a process that holds the lock, instead of raising.

    Raises:
        UserError: another process holds the lock; the message has its process id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            process, host = last_holder(folder)
            on_host = "" if host == platform.node() else f" on {host}"
            if not wait:
                known = process != UNKNOWN
                holder = f"process {process}{on_host}" if known else "another process"
                stop = f", or stop it with `kill {process}`{on_host}" if known else ""
                text = f"{shown_as or folder}: {holder} is writing there. Wait for it{stop}."
                raise UserError(Problem("folder-locked", text))
            log.info("wait        for process %s%s, which is writing to %s", process, on_host, shown_as or folder)
            flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} {platform.node()} {THIS_PROCESS}")
        file.flush()
        yield


def flock(file: IO[Any], operation: int) -> bool:
    """Return whether the lock was taken. A disk without locks gives it to every process."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def require_held(folder: Path) -> None:
    """Check during long work that this process still holds the lock: some network disks lock on one machine only.

    Raises:
        UserError: another process has taken the lock since. The first one stops.
    """
    with contextlib.suppress(FileNotFoundError):
        holder = (folder / "lock").read_text(encoding="utf-8")
        if holder and not holder.endswith(THIS_PROCESS):
            process, host = last_holder(folder)
            text = f"{folder}: process {process} on {host} has started the same run, as this disk has no locks"
            then = "Wait for it. If it has ended, run the same command again."
            raise UserError(Problem("run-taken-over", f"{text} between machines. {then}"))


def last_holder(folder: Path) -> tuple[str, str]:
    """Return process id and host of the last process that took the lock, else "unknown" and this host."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = (folder / "lock").read_text(encoding="utf-8").split()
        return process, host
    return UNKNOWN, platform.node()
