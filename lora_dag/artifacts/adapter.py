"""data/adapter/: what train hands to validate and export.

adapter.safetensors             the final adapter, float32; keys as PEFT names them; lora_dag/adapters/adapted.py says
                                how those of text encoders are named
snapshots/step-000050.safetensors   the adapter on its way
adapter.json                    PEFT's LoraConfig, base digests, steps, digest of every file
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import UserError
from lora_dag.core.files import read_json, sha256_file, understood, write_json
from lora_dag.core.tensors import load_metadata, load_tensors

if TYPE_CHECKING:
    import torch

FINAL = "adapter.safetensors"


def snapshot_name(step: int) -> str:
    return f"snapshots/step-{step:06d}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What was trained, on what, and for how long; weights are read on demand."""

    lora_config: dict[str, Any]
    """Arguments of peft.LoraConfig: r, lora_alpha, target_modules, ...; ``bias`` as lora_dag/adapters/bias.py means it.

    Of another algorithm than LoRA ``algo`` says so; its arguments have the same names.
    """
    base: dict[str, str]
    """Digest per component of the base it was trained on."""
    num_steps: int
    snapshots: list[int]
    """Steps at which a snapshot was kept, in order; the final adapter is not among them."""
    files: dict[str, str]
    """sha256 per file."""
    biases: list[str] = field(default_factory=list)
    """Modules whose bias was trained; the files hold the deltas."""
    made_from: dict[str, Any] = field(default_factory=dict)
    """Digests of pictures, captions and latents, the parameters, and the packages' versions."""
    text_lora: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Component of each trained text encoder -> its arguments of peft.LoraConfig; left out of the file where empty."""

    def save(self, folder: Path) -> None:
        fields = asdict(self)
        if not self.text_lora:
            del fields["text_lora"]
        write_json(folder / "adapter.json", fields)

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
            UserError: the file is missing, does not match its recorded digest, or was trained in another bias mode.
        """
        name = FINAL if step is None else snapshot_name(step)
        path = folder / name
        if not path.exists() or sha256_file(path) != self.files[name]:
            raise UserError(f"{path}: missing or damaged; run `python -m stages.train` again")
        recorded, wanted = load_metadata(path), bias_metadata(self.lora_config.get("bias", "none"), self.biases)
        if {name: text for name, text in recorded.items() if name.startswith("bias")} != wanted:
            found = recorded.get("bias", "none")
            raise UserError(
                f"{path}: trained with lora.bias {found}, {folder}/adapter.json says "
                f"{wanted.get('bias', 'none')}; run `python -m stages.train` again"
            )
        return load_tensors(path)


def algorithm(lora_config: dict[str, Any]) -> str:
    """What was trained, as its papers write it."""
    return {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}[lora_config.get("algo", "lora")]


def bias_metadata(mode: str, biases: list[str]) -> dict[str, str]:
    """What a weight file's header says of trained biases: mode and modules, nothing where there are none."""
    return {} if mode == "none" else {"bias": mode, "biases": json.dumps(biases)}
