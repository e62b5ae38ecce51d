"""One function per format; each takes the trained adapter and writes a folder.

``parts`` holds it by component: the denoiser, and text encoders that were trained beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.core import lora, quiet
from stages.core.adapted import long_name
from stages.core.base_files import absent, component_files
from stages.core.files import load_metadata, load_tensors, save_tensors, write_json
from stages.export import header
from stages.export.trained import product

if TYPE_CHECKING:
    from stages.core.params import ModelParams
    from stages.export.trained import Trained
    from stages.families.base import Family

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

Parts = dict[str, "Trained"]


def pipeline_class(family: Family) -> Any:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        import diffusers

        return getattr(diffusers, family.PIPELINE)


def write_diffusers(family: Family, parts: Parts, fields: dict[str, str], folder: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with each LoraConfig in its header: without it, alpha would be guessed."""
    layers, configs = {}, {}
    for component, trained in parts.items():
        tensors = with_biases(trained).items()
        layers[f"{component}_lora_layers"] = {file_name(component, name): tensor for name, tensor in tensors}
        configs[f"{component}_lora_adapter_metadata"] = peft_dict(trained)
    pipeline_class(family).save_lora_weights(folder, **layers, **configs)
    path = folder / DIFFUSERS_FILE
    header.save(path, load_tensors(path), load_metadata(path) | fields)


def file_name(component: str, name: str) -> str:
    """A module's or tensor's name as any release of other programs knows it."""
    return long_name(name) if component.startswith("text_encoder") else name


def write_peft(family: Family, parts: Parts, fields: dict[str, str], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` names them."""
    for component, trained in parts.items():
        place = peft_folder(family, folder, component)
        write_json(place / "adapter_config.json", peft_dict(trained, inference_mode=True))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in with_biases(trained).items()}
        header.save(place / "adapter_model.safetensors", tensors, fields)


def peft_folder(family: Family, folder: Path, component: str) -> Path:
    """The denoiser's adapter is the folder itself, a text encoder's is below it."""
    return folder if component == family.DENOISER else folder / component


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
    config = lora.peft_config(trained.config, **changes).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def write_comfyui(family: Family, parts: Parts, fields: dict[str, str], path: Path) -> None:
    """Keys as ComfyUI reads them: kohya's lora_down, lora_up, dora_scale, diff_b; LyCORIS's lokr_*, hada_*; alpha.

    ComfyUI divides a DoRA layer by the base's row norms where PEFT divides by those of W + s B A: dora_scale is the
    magnitude times their ratio, exact at strength 1.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, trained in parts.items():
        prefix = comfyui_prefix(component, family)
        for name in trained.scalings:
            key = comfyui_key(file_name(component, name), prefix)
            tensors |= {f"{key}.{leaf}": tensor for leaf, tensor in comfyui_tensors(trained, name).items()}
        for name, delta in trained.biases.items():
            tensors[f"{comfyui_key(name, prefix)}.diff_b"] = delta
    header.save(path, tensors, fields)


def comfyui_tensors(trained: Trained, name: str) -> dict[str, torch.Tensor]:
    """A target's tensors and alpha by their last names."""
    if "algo" in trained.config:
        return lycoris_tensors(trained, name)
    tensors = {
        "lora_down.weight": trained.weights[f"{name}.lora_A.weight"],
        "lora_up.weight": trained.weights[f"{name}.lora_B.weight"],
        "alpha": torch.tensor(float(trained.scalings[name] * trained.ranks[name])),
    }
    if name in trained.row_factors:
        tensors["dora_scale"] = trained.row_factors[name] * trained.row_norms[name]
    return tensors


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


def comfyui_prefix(component: str, family: Family) -> str:
    """Text encoders are numbered where a family has several. Source: kohya's sd-scripts, networks/lora*.py."""
    if component == "transformer":
        return "transformer."
    if component == "unet":
        return "lora_unet_"
    if component == "text_encoder":
        return "lora_te1_" if "text_encoder_2" in family.COMPONENTS else "lora_te_"
    return f"lora_te{component.removeprefix('text_encoder_')}_"


def comfyui_key(name: str, prefix: str) -> str:
    """``down_blocks.0.conv`` -> ``lora_unet_down_blocks_0_conv``; a transformer's names are kept."""
    return prefix + (name if prefix.endswith(".") else name.replace(".", "_"))


def write_merged(model: ModelParams, family: Family, parts: Parts, modules: dict[str, Any], folder: Path) -> None:
    """The base's own files beside ``modules``, whose weights become those with the adapter in them, in float32."""
    base = Path(model.pretrained)
    folder.mkdir(parents=True)
    shutil.copyfile(base / "model_index.json", folder / "model_index.json")
    for component in set(family.COMPONENTS) - absent(model, family.COMPONENTS):
        (folder / component).mkdir()
        for path in component_files(base / component, model.variant):
            if component not in parts or path.suffix == ".json" and ".index." not in path.name:
                shutil.copyfile(path, folder / component / path.name)
    suffix = f".{model.variant}" if model.variant else ""
    for component, trained in parts.items():
        stem = "diffusion_pytorch_model" if component == family.DENOISER else "model"
        tensors = modules[component].state_dict()
        merge(trained, tensors)
        tensors = {file_name(component, name): tensor for name, tensor in tensors.items()}
        save_tensors(folder / component / f"{stem}{suffix}.safetensors", tensors, {"format": "pt"})


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
