"""What a written file says of itself: what it is, and what it was made from. No path, user, time or git revision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts.adapter import FINAL
from stages.core.files import save_tensors

if TYPE_CHECKING:
    import torch

    from stages.artifacts.adapter import Adapter
    from stages.core.params import ModelParams
    from stages.export.params import ExportParams

# What community tools show; names of https://github.com/Stability-AI/ModelSpec, architectures of its registry.
ARCHITECTURES = {
    "sd": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3-medium",
    "flux": "flux-1-dev",
}
PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


def metadata(model: ModelParams, params: ExportParams, adapter: Adapter, prediction_type: str) -> dict[str, str]:
    """For the header of every file. ``modelspec.date`` is left out: it would change the bytes for the same inputs."""
    config = adapter.lora_config
    made_from = {
        "adapter": adapter.files[FINAL],
        "base": adapter.base,
        "base_name": Path(model.pretrained).name,
        "biases": adapter.biases,
        "family": model.family,
        "lora_config": config,
        "num_steps": adapter.num_steps,
        **adapter.made_from,
    } | ({"text_lora": adapter.text_lora} if adapter.text_lora else {})
    fields = {
        "format": "pt",
        "lora_dag": json.dumps(made_from, sort_keys=True, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES.get(model.family, model.family)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": params.name,
        "ss_network_alpha": f"{config['lora_alpha']:g}",
        "ss_network_dim": str(config["r"]),
        "ss_network_module": "networks.lora",
        "ss_steps": str(adapter.num_steps),
    }
    if prediction_type in PREDICTION:
        fields["modelspec.prediction_type"] = PREDICTION[prediction_type]
    return fields


def save(path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, str]) -> None:
    """A safetensors file with a header of ``fields`` and the digest of its tensors."""
    save_tensors(path, tensors, fields | {"modelspec.hash_sha256": f"0x{tensors_digest(tensors)}"})


def tensors_digest(tensors: dict[str, Any]) -> str:
    """sha256 over the tensors' bytes in the order of their names, which is the file's where all have one dtype."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
