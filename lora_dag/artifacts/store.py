"""The content-addressed store: encoded pictures and captions under the state directory, where no DAG tool deletes them.

<state>/store/<kind>/<2 hex>/<key>.safetensors   kind: ``latents``, ``masks`` or ``text``; cache_latents/keys.py says
                                                 what keys are made of, its metadata what made an entry
<state>/store/last.json, proven.json             what cache_latents wrote down; neither decides a result
<state>/store/inspected-*.sqlite                 of prepare
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, get_args

from lora_dag.core.console import UserError, log
from lora_dag.core.files import state_dir
from lora_dag.core.locks import flock
from lora_dag.core.tensors import save_tensors

if TYPE_CHECKING:
    import torch

Kind = Literal["latents", "masks", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Entry:
    tensors: dict[str, torch.Tensor]
    made_by: str
    """The environment that made it, as sorted JSON; empty where it was not recorded."""


class Store:
    """Entries are written whole, and read only if their checksum holds; so no write waits for the disk."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or state_dir() / "store"

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def save(self, kind: Kind, key: str, tensors: dict[str, torch.Tensor], made_by: str = "") -> None:
        entry = f"{kind}/{key}"
        metadata = {"entry": entry, "made_by": made_by, "sha256": checksum(tensors, made_by, entry)}
        save_tensors(self.path(kind, key), tensors, metadata, sync=False)

    def has(self, kind: Kind, key: str) -> bool:
        """Whether an entry stands there in its full length: 20 microseconds; ``load`` looks at the bytes."""
        path = self.path(kind, key)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = file.seek(0, 2)
                file.seek(8)
                header = json.loads(file.read(length)) if length < size else {}
            whole = 8 + length + max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry) == size
        except FileNotFoundError:
            return False
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            log.warning("warning: %s is damaged and is made again", path)
        return whole

    def load(self, kind: Kind, key: str) -> Entry | None:
        """None where there is no entry, or where its bytes are not what was saved under this kind and key."""
        return read(self.path(kind, key), f"{kind}/{key}")

    def touch(self, kind: Kind, key: str) -> None:
        """Note that a run used the entry now: ``lora-dag gc`` deletes what was not used for long."""
        with contextlib.suppress(OSError):  # another person's, or on a disk that cannot be written
            os.utime(self.path(kind, key))

    def entries(self) -> Iterator[tuple[Kind, Path]]:
        """Every file below the kinds' folders, leftovers of killed writes included; their names start with a dot."""
        for kind in KINDS:
            for path in sorted((self.root / kind).glob("*/*")):
                if path.is_file():
                    yield kind, path

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by any number of runs that read and write; waits while another process has it alone."""
        with self._lock_file() as file:
            flock(file, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Held by one process, to delete.

        Raises:
            UserError: a run is at work.
        """
        with self._lock_file() as file:
            if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise UserError(f"{self.root}: a run of cache_latents is at work here; wait for its end")
            yield

    def _lock_file(self) -> TextIO:
        self.root.mkdir(parents=True, exist_ok=True)
        return (self.root / "lock").open("a")


def read(path: Path, name: str) -> Entry | None:
    """An entry, if its checksum holds and it was saved as ``name``; those of the first version do not say as what."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    made_by, entry = metadata.get("made_by", ""), metadata.get("entry", "")
    is_sound = entry in (name, "") and metadata.get("sha256") == checksum(tensors, made_by, entry)
    return Entry(tensors, made_by) if is_sound else None


def checksum(tensors: dict[str, torch.Tensor], made_by: str, entry: str) -> str:
    """sha256 over what made them, the entry's kind and key, names, dtypes, shapes and bytes."""
    import torch

    total = hashlib.sha256((made_by + entry).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
