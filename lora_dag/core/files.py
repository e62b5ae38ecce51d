"""Files that are whole or absent, JSON, digests, and the state directory."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_dag.core.console import Problem, UserError, as_os_error


def state_dir() -> Path:
    """Return the folder of caches and checkpoints: ``$LORA_STATE_DIR``, else ``$DVC_ROOT/.state``, else ``./.state``.

    DVC sets ``$DVC_ROOT`` to the main workspace also inside ``--temp`` and queued runs.
    """
    explicit = os.environ.get("LORA_STATE_DIR")
    return Path(os.path.expanduser(explicit)) if explicit else Path(os.environ.get("DVC_ROOT", ".")) / ".state"


def missing_file(path: Path) -> Problem:
    """Return the problem of an argument that is no file: a wrong path, or a folder."""
    fault = "a folder, but a file is expected. Name a file in it" if path.is_dir() else "no such file. Correct the path"
    return Problem("file-missing", f"{path}: {fault}.")


@contextlib.contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed, on an error removed.

    Args:
        sync: wait for the disk, so that a power cut leaves the old file or the new one. False for checksummed files.

    Raises:
        OSError: of the disk, with ``path`` as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(path):
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
def name_in_errors(path: Path) -> Iterator[None]:
    """Make errors of writing name ``path`` instead of its temporary file, or of no file."""
    try:
        yield
    except Exception as error:
        cause, prefix = as_os_error(error), f".{path.name}."
        if cause is None or not cause.errno or not Path(cause.filename or prefix).name.startswith(prefix):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that replaces it on success; on an error the old folder is unchanged."""
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
        if before.exists() and not folder.exists():  # interrupted between the two renames
            before.replace(folder)
        for path in (aside, before):
            shutil.rmtree(path, ignore_errors=True)


def drop_leftovers(folder: Path) -> None:
    """Delete temporary files of killed writes in a folder that only this process writes."""
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
    """Write JSON with sorted keys and without NaN: equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def from_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is no JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        text = f"{path}: invalid JSON ({error}). Delete the file and run `dvc repro`."
        raise UserError(Problem("artifact-damaged", text)) from None


@contextlib.contextmanager
def artifact_errors(path: Path, stage: str) -> Iterator[None]:
    """Turn errors of parsing an artifact into a UserError: the file was edited by hand or is of another version.

    Args:
        stage: module of the stage that writes the artifact.

    Raises:
        UserError: with the stage to run again.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]
        text = f"{path}: edited by hand or of another version ({detail}). Run `python -m {stage}` again."
        raise UserError(Problem("artifact-damaged", text)) from None


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()).hexdigest()
