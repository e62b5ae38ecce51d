"""Files that are whole or absent, the state directory, digests and locks."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import ValidationError

from lora_dag.core.console import UserError, log, refusal

if TYPE_CHECKING:
    import torch


THIS_PROCESS = secrets.token_hex(8)  # beside its number, which a container's may share


def state_dir() -> Path:
    """What must survive the deleting of outputs: ``$LORA_STATE_DIR``, else ``$DVC_ROOT/.state``, else ``./.state``.

    DVC sets ``$DVC_ROOT`` to the main workspace also inside ``--temp`` and queued runs.
    """
    explicit = os.environ.get("LORA_STATE_DIR")
    return Path(os.path.expanduser(explicit)) if explicit else Path(os.environ.get("DVC_ROOT", ".")) / ".state"


@contextlib.contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed, on an error removed.

    Args:
        sync: wait for the disk, so that a power cut leaves the old file or the new one. False where a checksum tells.

    Raises:
        OSError: the disk refuses; naming ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~umask())  # mkstemp and safetensors write 0600
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if sync:
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, what is written will be ``path``: a refusal that names no file, or a temporary one, names it instead."""
    try:
        yield
    except Exception as error:
        refused, own = refusal(error), f".{path.name}."
        if refused is None or not refused.errno or not Path(refused.filename or own).name.startswith(own):
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place on success; on an error the old one stays."""
    aside, before = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)  # of a run that was killed
            folder.replace(before)
        aside.replace(folder)
    finally:
        if before.exists() and not folder.exists():  # broken off between the two
            before.replace(folder)
        for path in (aside, before):
            shutil.rmtree(path, ignore_errors=True)


def drop_leftovers(folder: Path) -> None:
    """Delete what killed writes left below a folder that this process alone writes."""
    for path in folder.rglob(".*"):
        path.unlink()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, no NaN, a newline at the end: the same value gives the same bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, no JSON ({error}); delete it and run `dvc repro`") from None


@contextlib.contextmanager
def understood(path: Path, stage: str) -> Iterator[None]:
    """Inside, an artifact is taken apart; content of another shape was written by hand or by another version.

    Raises:
        UserError: naming the stage that writes it.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]
        raise UserError(
            f"{path}: edited by hand or of another version ({what}); run `python -m {stage}` again"
        ) from None


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, sync: bool = True
) -> None:
    """A safetensors file, written whole; keys sorted, one byte sequence for one content. ``sync`` as in ``atomic``."""
    from safetensors.torch import save_file

    data = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic(path, sync) as temporary:
        save_file(data, temporary, dict(sorted((metadata or {}).items())))  # from where the tensors lie, without a copy
        sort_header(temporary)


def sort_header(path: Path) -> None:
    """Rewrite a safetensors header with sorted metadata: the library's own order of metadata keys varies."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = {name: header[name] for name in sorted(header)}
        if "__metadata__" in ordered:
            ordered["__metadata__"] = dict(sorted(ordered["__metadata__"].items()))
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:  # the tensors stand behind it
            raise RuntimeError(f"{path}: the header became longer")
        file.seek(8)
        file.write(text)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def load_metadata(path: Path) -> dict[str, str]:
    """What a safetensors header says beside the tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()).hexdigest()


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
