"""data/adapter/: the output of train, the input of validate and export.

adapter.safetensors             the final adapter, float32, with PEFT's keys; lora_dag/adapters/adapter_set.py documents
                                the keys of text encoders
snapshots/step-000050.safetensors   the adapter at an earlier step
adapter.json                    PEFT's LoraConfig, base digests, steps, digest of every file
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import artifact_errors, read_json, sha256_file, write_json
from lora_dag.core.tensors import load_metadata, load_tensors

if TYPE_CHECKING:
    import torch

FINAL = "adapter.safetensors"


def snapshot_name(step: int) -> str:
    return f"snapshots/step-{step:06d}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """Configuration and provenance of a trained adapter; weights are read on demand."""

    lora_config: dict[str, Any]
    """Arguments of peft.LoraConfig: r, lora_alpha, target_modules, ...; ``bias`` as in lora_dag/adapters/bias.py.

    Another algorithm than LoRA has its name in ``algo`` and arguments of the same names.
    """
    base: dict[str, str]
    """Component -> digest of the base model that it was trained on."""
    num_steps: int
    snapshots: list[int]
    """Steps of the snapshots, in order, without the final adapter."""
    files: dict[str, str]
    """File -> sha256."""
    biases: list[str] = field(default_factory=list)
    """Modules with a trained bias; the files contain the differences."""
    made_from: dict[str, Any] = field(default_factory=dict)
    """Digests of images, captions and latents, the parameters, and the packages' versions."""
    text_lora: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Component of each trained text encoder -> its arguments of peft.LoraConfig; not in the file if empty."""

    def save(self, folder: Path) -> None:
        fields = asdict(self)
        if not self.text_lora:
            del fields["text_lora"]
        write_json(folder / "adapter.json", fields)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        path = folder / "adapter.json"
        if not path.exists():
            raise UserError(Problem("artifact-missing", f"{path}: no such file. Run `python -m stages.train` first."))
        with artifact_errors(path, "stages.train"):
            adapter = cls(**read_json(path))
            [adapter.files[name] for name in (FINAL, *map(snapshot_name, adapter.snapshots))]
            return adapter

    def weights(self, folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
        """Return the state dict of the snapshot at ``step``, or of the final adapter.

        Raises:
            UserError: the file is missing, does not match its digest, or was trained with another bias mode.
        """
        name = FINAL if step is None else snapshot_name(step)
        path = folder / name
        if not path.exists() or sha256_file(path) != self.files[name]:
            text = f"{path}: missing or damaged. Run `python -m stages.train` again."
            raise UserError(Problem("adapter-damaged", text))
        recorded, expected = load_metadata(path), bias_metadata(self.lora_config.get("bias", "none"), self.biases)
        if {name: text for name, text in recorded.items() if name.startswith("bias")} != expected:
            modes = f"trained with lora.bias {recorded.get('bias', 'none')}, but {folder}/adapter.json has"
            text = f"{path}: {modes} {expected.get('bias', 'none')}. Run `python -m stages.train` again."
            raise UserError(Problem("adapter-damaged", text))
        return load_tensors(path)


def algorithm(lora_config: dict[str, Any]) -> str:
    """Return the name of the algorithm, as its paper writes it."""
    return {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}[lora_config.get("algo", "lora")]


def bias_metadata(mode: str, biases: list[str]) -> dict[str, str]:
    """Return the entries of a weight file's header about trained biases: mode and modules; empty without biases."""
    return {} if mode == "none" else {"bias": mode, "biases": json.dumps(biases)}
