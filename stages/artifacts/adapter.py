"""data/adapter/: what train hands to validate and export.

adapter.safetensors             the final adapter, float32, keys as PEFT names them
snapshots/step-000050.safetensors   the adapter on its way
adapter.json                    PEFT's LoraConfig, base digests, steps, digest of every file
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.console import UserError
from stages.core.files import load_tensors, read_json, sha256_file, understood, write_json

if TYPE_CHECKING:
    import torch

FINAL = "adapter.safetensors"


def snapshot_name(step: int) -> str:
    return f"snapshots/step-{step:06d}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What was trained, on what, and for how long; weights are read on demand."""

    lora_config: dict[str, Any]
    """Arguments of peft.LoraConfig: r, lora_alpha, target_modules, ..."""
    base: dict[str, str]
    """Digest per component of the base it was trained on."""
    num_steps: int
    snapshots: list[int]
    """Steps at which a snapshot was kept, in order; the final adapter is not among them."""
    files: dict[str, str]
    """sha256 per file."""

    def save(self, folder: Path) -> None:
        write_json(folder / "adapter.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        path = folder / "adapter.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; run `python -m stages.train` first")
        with understood(path, "stages.train"):
            adapter = cls(**read_json(path))
            [adapter.files[name] for name in (FINAL, *map(snapshot_name, adapter.snapshots))]
            return adapter

    def weights(self, folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
        """State dict of the snapshot at ``step``, or of the final adapter.

        Raises:
            UserError: the file is missing or does not match its recorded digest.
        """
        name = FINAL if step is None else snapshot_name(step)
        path = folder / name
        if not path.exists() or sha256_file(path) != self.files[name]:
            raise UserError(f"{path}: missing or damaged; run `python -m stages.train` again")
        return load_tensors(path)
