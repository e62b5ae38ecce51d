"""safetensors files: written whole, one byte sequence for one content; read whole, by tensor, or the header only."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.files import atomic, from_json

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
"""Dtype in a safetensors header -> its name in torch, for files that are mapped."""
MAX_MAPPED = 2**26
LIBC = ctypes.CDLL(None)


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, sync: bool = True
) -> None:
    """Write a safetensors file with sorted keys: equal content gives equal bytes. ``sync`` as in ``atomic``."""
    from safetensors.torch import save_file

    data = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic(path, sync) as temporary:
        save_file(data, temporary, dict(sorted((metadata or {}).items())))  # without a copy of the tensors
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
        if len(text) != length:  # the tensors follow it
            raise RuntimeError(f"{path}: the header became longer")
        file.seek(8)
        file.write(text)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class MappedTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of safetensors files, mapped into memory and not copied; callers must not change them.

    The process keeps about MAX_MAPPED bytes of the files in its memory, however large they are. A file that is replaced
    meanwhile is still read as it was. Names are distinct over all files.
    """

    def __init__(self) -> None:
        self.files: list[torch.Tensor] = []  # each the whole file, uint8 [bytes]
        self.places: dict[str, tuple[int, int, int, str, tuple[int, ...]]] = {}  # file, begin, end, dtype, shape
        self.num_bytes = 0  # read since the pages were last given back

    def add(self, path: Path) -> str:
        """Map a file and return the sha256 of the mapped bytes.

        Raises:
            ValueError: the file is damaged.
            OSError, RuntimeError: the file cannot be read.
        """
        import torch

        file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        digest = hashlib.sha256()
        for part in file.split(MAX_MAPPED):
            digest.update(part.numpy())
            give_back(file)
        start = 8 + int.from_bytes(file[:8].numpy(), "little")
        try:
            header = json.loads(file[8:start].numpy().tobytes())
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = (start + offset for offset in entry["data_offsets"])
                    self.places[name] = (len(self.files), begin, end, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(str(path)) from error
        self.files.append(file)
        return digest.hexdigest()

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        file, begin, end, dtype, shape = self.places[name]
        self.num_bytes += end - begin
        if self.num_bytes > MAX_MAPPED:
            self.num_bytes = 0
            for mapped in self.files:
                give_back(mapped)
        return self.files[file][begin:end].view(getattr(torch, dtype)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


def give_back(file: torch.Tensor) -> None:
    """Remove the pages of a mapped file from the memory of this process; the next use reads them again."""
    LIBC.madvise(ctypes.c_void_p(file.data_ptr()), ctypes.c_size_t(file.numel()), mmap.MADV_DONTNEED)


def load_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def has_all_bytes(path: Path) -> bool:
    """Return whether a safetensors file has the length that its header gives."""
    return bool(read_header(path))


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return tensor -> ``dtype``, ``shape`` and ``data_offsets``; empty for a damaged or other file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = from_json(file.read(length)) if length < path.stat().st_size else {}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in entries.values())
        return entries if path.stat().st_size == 8 + length + end else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
