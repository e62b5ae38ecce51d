"""An adapter of one kind, as if trained for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_dag.adapters import lora
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.bases import component_files
from lora_dag.core import params, seeding
from lora_dag.core.files import sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import save_tensors
from lora_dag.families import sd

ADAPTER = Path("data/adapter")
CONFIG: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 6.0,  # three times the rank: lost, the image would be another
    "lora_dropout": 0.0,
    "target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
    "init_lora_weights": "gaussian",
    "bias": "none",
}


def write_adapter() -> None:
    """data/adapter, as if trained for long."""
    model = params.load(Path("params.yaml")).section(ModelParams)
    denoiser = sd.load_denoiser(model, torch.device("cpu"))
    for name, parameter in lora.inject(denoiser, CONFIG).items():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=seeding.generator(0, "test", name))
    save_tensors(ADAPTER / FINAL, lora.state_dict(denoiser))
    digests = component_files.digests(model, sd.COMPONENTS)
    Adapter(CONFIG, digests, 4, [], {FINAL: sha256_file(ADAPTER / FINAL)}).save(ADAPTER)
