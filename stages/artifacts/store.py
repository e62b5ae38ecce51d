"""The content-addressed store: encoded pictures and captions under the state directory, where no DAG tool deletes them.

<state>/store/<kind>/<2 hex>/<key>.safetensors   kind: ``latents`` or ``text``; a key names all that decides the tensors
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.core.console import log
from stages.core.files import save_tensors, state_dir

if TYPE_CHECKING:
    import torch

Kind = Literal["latents", "text"]


class Store:
    """Entries are written whole, and read only if their checksum holds."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or state_dir() / "store"

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def save(self, kind: Kind, key: str, tensors: dict[str, torch.Tensor]) -> None:
        save_tensors(self.path(kind, key), tensors, {"sha256": checksum(tensors)})

    def find(self, kind: Kind, key: str) -> dict[str, torch.Tensor] | None:
        """The entry's tensors; None where there is none, or, with a warning, where its bytes are not what was saved."""
        from safetensors import SafetensorError, safe_open

        path = self.path(kind, key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                saved = (file.metadata() or {}).get("sha256")
            if saved == checksum(tensors):
                return tensors
        except (SafetensorError, OSError):
            pass
        log.warning("warning: %s is damaged and is made again", path)
        return None


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
