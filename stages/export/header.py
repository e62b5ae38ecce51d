"""What a written file says of itself: what it is, and what it was made from. No path, user, time or git revision."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from stages.artifacts.adapter import FINAL
from stages.core.files import save_tensors, sha256_file

if TYPE_CHECKING:
    import torch

    from stages.artifacts.adapter import Adapter
    from stages.core.params import ModelParams
    from stages.export.params import ExportParams
    from stages.families.base import Family

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
    fields = {
        "format": "pt",
        "lora_dag": json.dumps(made_from(model, params, adapter), sort_keys=True, ensure_ascii=False),
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
    if params.license:
        fields["modelspec.license"] = params.license
    return fields


def made_from(model: ModelParams, params: ExportParams, adapter: Adapter) -> dict[str, Any]:
    """The adapter and everything that determined it."""
    known = {
        "adapter": adapter.files[FINAL],
        "base": adapter.base,
        "base_name": Path(model.pretrained).name,
        "biases": adapter.biases,
        "family": model.family,
        "lora_config": adapter.lora_config,
        "num_steps": adapter.num_steps,
        **adapter.made_from,
    }
    return known | ({"base_model": params.base_model} if params.base_model else {})


def lineage(model: ModelParams, family: Family, params: ExportParams, adapter: Adapter, folder: Path) -> dict[str, Any]:
    """reports/export/lineage.json: what the files in ``folder`` were made from, how they are loaded, their digests."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    pretrained = PurePath(model.pretrained)
    return made_from(model, params, adapter) | {
        "export": params.model_dump(exclude={"push_to_hub"}),
        "files": {n: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for n, path in files.items()},
        "pipeline": {
            "class": family.PIPELINE,
            "denoiser": family.DENOISER,
            "left_out": list(family.left_out(model)),
            "pretrained": pretrained.name if pretrained.is_absolute() else pretrained.as_posix(),
            "variant": model.variant,
        },
    }


def save(path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, str]) -> None:
    """A safetensors file with a header of ``fields`` and the digest of its tensors."""
    save_tensors(path, tensors, fields | {"modelspec.hash_sha256": f"0x{tensors_digest(tensors)}"})


def tensors_digest(tensors: dict[str, Any]) -> str:
    """sha256 over the tensors' bytes in the order of their names, which is the file's where all have one dtype."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
