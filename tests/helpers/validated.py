"""An adapter as if trained for four steps, and what validate wrote of it."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_dag.adapters import lora
from lora_dag.artifacts.adapter import FINAL, Adapter, snapshot_name
from lora_dag.bases import component_files
from lora_dag.core import params, seeding
from lora_dag.core.files import sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import save_tensors
from lora_dag.families import sd
from tests.helpers.workspace import Workspace

CONFIG = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": True}


def write_adapter(strength: float, rank: int = 2) -> None:
    """data/adapter with a snapshot at step 2 and the final one at step 4; strength 0 leaves the base as it is."""
    config = CONFIG | {"r": rank}
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser = sd.load_denoiser(model, torch.device("cpu"))
    trainable = lora.inject(denoiser, config)
    files = {}
    for step, name in ((2, snapshot_name(2)), (4, FINAL)):
        for key, parameter in trainable.items():
            noise = torch.randn(parameter.shape, generator=seeding.generator(0, "test", key))
            parameter.data = noise * (step * strength if "lora_B" in key else 0.2)
        save_tensors(Path("data/adapter") / name, lora.state_dict(denoiser))
        files[name] = sha256_file(Path("data/adapter") / name)
    Adapter(config, component_files.digests(model, sd.COMPONENTS), 4, [2], files).save(Path("data/adapter"))


def reports(workspace: Workspace) -> dict[str, bytes]:
    """What DVC hashes or git versions; run.json holds time and memory."""
    return {name: blob for name, blob in workspace.tree("reports").items() if name != "validate/run.json"}
