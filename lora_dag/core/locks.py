"""Locks on folders: one process at a time writes an output or goes on with a run."""

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

from lora_dag.core.console import UserError, log
from lora_dag.core.files import state_dir

THIS_PROCESS = secrets.token_hex(8)  # beside its number, which a container's may share


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold an output folder, so that two runs cannot leave a mix of both.

    Raises:
        UserError: another process is writing there; its pid is named.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with lock(state_dir() / "writing" / name, shown=folder):
        yield


@contextlib.contextmanager
def lock(folder: Path, shown: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the kernel frees it when the process dies, however it dies.

    Args:
        shown: what to name in the refusal instead.
        wait: for a process that holds it, instead of the refusal.

    Raises:
        UserError: another process holds it; its pid is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            process, host = last_holder(folder)
            where = "" if host == platform.node() else f" on {host}"
            if not wait:
                cure = f"wait for it, or stop it{' there' if where else ''}: kill {process}"
                raise UserError(f"{shown or folder}: process {process}{where} is at work on this run; {cure}")
            log.info("wait        for process %s%s, which is at work on %s", process, where, shown or folder)
            flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} {platform.node()} {THIS_PROCESS}")
        file.flush()
        yield


def flock(file: IO[Any], operation: int) -> bool:
    """Whether the lock is taken; a disk that knows no locks gives it to everyone."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def require_held(folder: Path) -> None:
    """For long work under a lock: some network disks carry no lock from one machine to another.

    Raises:
        UserError: another process has taken the lock since; the one that came first gives way.
    """
    with contextlib.suppress(FileNotFoundError):
        held = (folder / "lock").read_text(encoding="utf-8")
        if held and not held.endswith(THIS_PROCESS):
            process, host = last_holder(folder)
            raise UserError(
                f"{folder}: process {process} on {host} has taken this run over, since this disk carries no locks "
                "between machines; wait for it, or where it is gone run the same command again"
            )


def last_holder(folder: Path) -> tuple[str, str]:
    """Process id and host of who took the folder's lock last; "unknown" of this host where nothing says."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = (folder / "lock").read_text(encoding="utf-8").split()
        return process, host
    return "unknown", platform.node()
