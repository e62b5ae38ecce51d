"""safetensors files: written whole, one byte sequence for one content; their headers read without the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.files import atomic, from_json

if TYPE_CHECKING:
    import torch


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
