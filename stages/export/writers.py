"""One function per format; each takes the trained adapter and writes a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.core import lora, quiet
from stages.core.base_files import absent, component_files
from stages.core.files import load_metadata, load_tensors, save_tensors, write_json
from stages.export import header
from stages.export.trained import product

if TYPE_CHECKING:
    from stages.core.params import ModelParams
    from stages.export.trained import Trained
    from stages.families.base import Family

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def pipeline_class(family: Family) -> Any:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        import diffusers

        return getattr(diffusers, family.PIPELINE)


def write_diffusers(family: Family, trained: Trained, fields: dict[str, str], folder: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with the LoraConfig in its header: without it, alpha would be guessed."""
    prefix = family.DENOISER
    layers = {f"{prefix}_lora_layers": with_biases(trained)}
    pipeline_class(family).save_lora_weights(
        folder, **layers, **{f"{prefix}_lora_adapter_metadata": peft_dict(trained)}
    )
    path = folder / DIFFUSERS_FILE
    header.save(path, load_tensors(path), load_metadata(path) | fields)


def write_peft(trained: Trained, fields: dict[str, str], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` names them."""
    write_json(folder / "adapter_config.json", peft_dict(trained, inference_mode=True))
    tensors = {f"base_model.model.{name}": tensor for name, tensor in with_biases(trained).items()}
    header.save(folder / "adapter_model.safetensors", tensors, fields)


def with_biases(trained: Trained) -> dict[str, torch.Tensor]:
    """PEFT's tensors with each trained bias as that of B, which PEFT multiplies by the layer's scaling.

    A layer without one gets zeros: ``lora_bias`` holds for all layers of a PEFT adapter or for none.
    """
    tensors = dict(trained.weights)
    if trained.biases:
        for name, scaling in trained.scalings.items():
            num_outputs = len(tensors[f"{name}.lora_B.weight"])
            delta = trained.biases.get(name, torch.zeros(num_outputs))
            tensors[f"{name}.lora_B.bias"] = delta / scaling
    return tensors


def peft_dict(trained: Trained, **changes: Any) -> dict[str, Any]:
    """PEFT's config as JSON values."""
    if trained.biases:
        changes |= {"lora_bias": True, "init_lora_weights": True}  # PEFT takes no gaussian start beside it
    config = lora.peft_config(trained.adapter.lora_config, **changes).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def write_comfyui(family: Family, trained: Trained, fields: dict[str, str], path: Path) -> None:
    """Keys as ComfyUI reads them: kohya's lora_down, lora_up, dora_scale, diff_b; LyCORIS's lokr_*, hada_*; alpha.

    ComfyUI divides a DoRA layer by the base's row norms where PEFT divides by those of W + s B A: dora_scale is the
    magnitude times their ratio, exact at strength 1.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, scaling in trained.scalings.items():
        key, rank = comfyui_key(name, family.DENOISER), trained.ranks[name]
        if "algo" in trained.adapter.lora_config:
            tensors |= {f"{key}.{leaf}": tensor for leaf, tensor in lycoris_tensors(trained, name).items()}
            continue
        tensors[f"{key}.lora_down.weight"] = trained.weights[f"{name}.lora_A.weight"]
        tensors[f"{key}.lora_up.weight"] = trained.weights[f"{name}.lora_B.weight"]
        tensors[f"{key}.alpha"] = torch.tensor(float(scaling * rank))
        if name in trained.row_factors:
            tensors[f"{key}.dora_scale"] = trained.row_factors[name] * trained.row_norms[name]
    for name, delta in trained.biases.items():
        tensors[f"{comfyui_key(name, family.DENOISER)}.diff_b"] = delta
    header.save(path, tensors, fields)


def lycoris_tensors(trained: Trained, name: str) -> dict[str, torch.Tensor]:
    """A target's tensors and alpha, as LyCORIS names them; so does PEFT.

    Two whole factors of LoKr stand for themselves there: LyCORIS and ComfyUI do not scale them, PEFT does.
    """
    scaling, rank = trained.scalings[name], trained.ranks[name]
    start = f"{name}."
    tensors = {key.removeprefix(start): tensor for key, tensor in trained.weights.items() if key.startswith(start)}
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        tensors["lokr_w1"] = scaling * tensors["lokr_w1"]
        scaling = 1.0
    return tensors | {"alpha": torch.tensor(float(scaling * rank))}


def comfyui_key(name: str, denoiser: str) -> str:
    """``down_blocks.0.conv`` -> ``lora_unet_down_blocks_0_conv``; a transformer's names are kept."""
    return f"lora_unet_{name.replace('.', '_')}" if denoiser == "unet" else f"transformer.{name}"


def write_merged(model: ModelParams, family: Family, trained: Trained, denoiser: Any, folder: Path) -> None:
    """The base's own files beside ``denoiser``, whose weights become those with the adapter in them, in float32."""
    base = Path(model.pretrained)
    folder.mkdir(parents=True)
    shutil.copyfile(base / "model_index.json", folder / "model_index.json")
    for component in set(family.COMPONENTS) - absent(model, family.COMPONENTS):
        (folder / component).mkdir()
        for path in component_files(base / component, model.variant):
            if component != family.DENOISER or path.suffix == ".json" and ".index." not in path.name:
                shutil.copyfile(path, folder / component / path.name)
    suffix = f".{model.variant}" if model.variant else ""
    tensors = denoiser.state_dict()
    merge(trained, tensors)
    save_tensors(folder / family.DENOISER / f"diffusion_pytorch_model{suffix}.safetensors", tensors, {"format": "pt"})


@torch.no_grad()
def merge(trained: Trained, weights: dict[str, torch.Tensor]) -> None:
    """In the base's float32 tensors, in place: W + s B A (times DoRA's factors), and bias + delta."""
    for name, scaling in trained.scalings.items():
        weight = weights[f"{name}.weight"]
        weight += scaling * product(trained.weights, name).reshape(weight.shape)
        if name in trained.row_factors:
            weight *= trained.row_factors[name]
    for name, delta in trained.biases.items():
        weights[f"{name}.bias"] += delta
