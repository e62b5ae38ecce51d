"""The content-addressed store: encoded images and captions in the state directory, where no DAG tool deletes them.

<state>/store/<kind>/<2 hex>/<key>.safetensors   kind: ``latents``, ``masks`` or ``text``; cache_latents/keys.py defines
                                                 keys; the metadata has the environment of an entry; packing.py
                                                 defines the form of text. Earlier versions kept text in form 1, under
                                                 other keys: cache_latents converts these entries, gc deletes them
<state>/store/last.json, proven.json             notes of cache_latents; no result depends on them
<state>/store/inspected-*.sqlite                 inspection cache of prepare
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

from lora_dag.core.console import Problem, UserError, warn
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
    """Environment that encoded the entry, as sorted JSON; empty if unknown."""


class Store:
    """Store of entries with checksums. Damaged entries count as missing, so writes need not wait for the disk."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or state_dir() / "store"

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def save(self, kind: Kind, key: str, tensors: dict[str, torch.Tensor], made_by: str = "") -> None:
        entry = f"{kind}/{key}"
        metadata = {"entry": entry, "made_by": made_by, "sha256": checksum(tensors, made_by, entry)}
        save_tensors(self.path(kind, key), tensors, metadata, sync=False)

    def has(self, kind: Kind, key: str) -> bool:
        """Return whether an entry exists in its full length, in 20 microseconds; ``load`` checks the bytes."""
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
            warn("store-entry-damaged", f"{path}: damaged. It is encoded again.")
        return whole

    def load(self, kind: Kind, key: str) -> Entry | None:
        """Return the entry; None if it is missing or its bytes are not those saved under this kind and key."""
        return read_entry(self.path(kind, key), f"{kind}/{key}")

    def touch(self, kind: Kind, key: str) -> None:
        """Set the time of last use: ``lora-dag gc`` deletes entries that are unused for long."""
        with contextlib.suppress(OSError):  # of another user, or on a read-only disk
            os.utime(self.path(kind, key))

    def entries(self) -> Iterator[tuple[Kind, Path]]:
        """Yield every file of each kind, including temporary files of killed writes, whose names start with a dot."""
        for kind in KINDS:
            for path in sorted((self.root / kind).glob("*/*")):
                if path.is_file():
                    yield kind, path

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold a lock that any number of runs share; wait while another process holds the store exclusively."""
        with self._lock_file() as file:
            flock(file, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the store exclusively, to delete entries.

        Raises:
            UserError: a run uses the store.
        """
        with self._lock_file() as file:
            if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                text = f"{self.root}: a run of cache_latents uses this store. Wait until it ends."
                raise UserError(Problem("store-in-use", text))
            yield

    def _lock_file(self) -> TextIO:
        self.root.mkdir(parents=True, exist_ok=True)
        return (self.root / "lock").open("a")


def read_entry(path: Path, name: str) -> Entry | None:
    """Return the entry if its checksum is right and it was saved as ``name``; entries of version 1 have no name."""
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
    """Return the sha256 over environment, kind and key, and each tensor's name, dtype, shape and bytes."""
    import torch

    total = hashlib.sha256((made_by + entry).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
