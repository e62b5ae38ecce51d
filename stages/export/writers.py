"""One function per format; each takes the trained adapter and writes a folder.

``parts`` holds it by component: the denoiser, and text encoders that were trained beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import lora, original_layout
from lora_dag.adapters.adapted import long_name
from lora_dag.bases.layout import component_files
from lora_dag.core.files import write_json
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.families import common
from stages.export import header
from stages.export.trained import folded, merged

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family
    from stages.export.trained import Trained

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

Parts = dict[str, "Trained"]


def write_diffusers(family: Family, parts: Parts, fields: dict[str, str], folder: Path) -> None:
    """``pytorch_lora_weights.safetensors``: the strength is in B, so that it is the same with and without the header.

    Each LoraConfig is in the header, with alpha = rank.
    """
    layers, configs = {}, {}
    parts = {component: folded(trained) for component, trained in parts.items()}
    for component, trained in parts.items():
        tensors = with_biases(trained).items()
        layers[f"{component}_lora_layers"] = {file_name(component, name): tensor for name, tensor in tensors}
        configs[f"{component}_lora_adapter_metadata"] = peft_dict(trained)
    common.pipeline_class(family).save_lora_weights(folder, **layers, **configs)
    path = folder / DIFFUSERS_FILE
    saved = load_tensors(path)
    header.save(path, saved, load_metadata(path) | fields | network(parts.values(), saved))


def file_name(component: str, name: str) -> str:
    """A module's or tensor's name as any release of other programs knows it."""
    return long_name(name) if component.startswith("text_encoder") else name


def write_peft(family: Family, parts: Parts, fields: dict[str, str], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` names them.

    A LoRA's strength is in B, for programs that read the tensors without the config.
    """
    for component, trained in parts.items():
        trained = folded(trained)
        place = peft_folder(family, folder, component)
        write_json(place / "adapter_config.json", peft_dict(trained, inference_mode=True))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in with_biases(trained).items()}
        header.save(place / "adapter_model.safetensors", tensors, fields | network([trained], tensors))


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
    """Keys as ComfyUI reads them.

    Of a UNet kohya's: lora_down, lora_up, alpha. Of a transformer diffusers' own, lora_A and lora_B without an alpha,
    the strength in B: diffusers reads that file too. Besides dora_scale, diff_b; of LyCORIS lokr_*, hada_*, alpha.
    ComfyUI divides a DoRA layer by the base's row norms where PEFT divides by those of W + s B A: dora_scale is the
    magnitude times their ratio, exact at strength 1. It brings the rows of B A into the order of the original
    checkpoint, and takes those of dora_scale for being in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    is_kohyas = family.DENOISER == "unet"
    parts = parts if is_kohyas else {component: folded(trained) for component, trained in parts.items()}
    for component, trained in parts.items():
        prefix = comfyui_prefix(component, family)
        for name in trained.scalings:
            key = comfyui_key(file_name(component, name), prefix)
            for leaf, tensor in comfyui_tensors(trained, name, is_kohyas).items():
                tensors[f"{key}.{leaf}"] = tensor
        for name, delta in trained.biases.items():
            tensors[f"{comfyui_key(name, prefix)}.diff_b"] = delta
    header.save(path, tensors, fields | network(parts.values(), tensors))


def comfyui_tensors(trained: Trained, name: str, is_kohyas: bool) -> dict[str, torch.Tensor]:
    """A target's tensors by their last names."""
    if "algo" in trained.config:
        return lycoris_tensors(trained, name)
    a, b = (trained.weights[f"{name}.lora_{which}.weight"] for which in "AB")
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if is_kohyas:
        alpha = torch.tensor(float(trained.scalings[name] * trained.ranks[name]))
        tensors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha}
    if name in trained.row_factors:
        rows = trained.row_factors[name] * trained.row_norms[name]
        tensors["dora_scale"] = original_layout.swap_halves(rows) if name in trained.swapped else rows
    return tensors


def lycoris_tensors(trained: Trained, name: str) -> dict[str, torch.Tensor]:
    """A target's tensors and alpha, as LyCORIS names them; so does PEFT.

    LoKr's second factor of a convolution in Tucker form is written whole: ComfyUI 0.29.0 leaves out a layer with
    lokr_t2. Two whole factors have the strength in the first one: LyCORIS and ComfyUI do not scale them, PEFT does.
    """
    scaling, rank = trained.scalings[name], trained.ranks[name]
    start = f"{name}."
    tensors = {key.removeprefix(start): tensor for key, tensor in trained.weights.items() if key.startswith(start)}
    if "lokr_t2" in tensors:
        tucker = (tensors.pop(leaf) for leaf in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        tensors["lokr_w2"] = torch.einsum("rskl,ro,si->oikl", *tucker).contiguous()
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        tensors["lokr_w1"] = scaling * tensors["lokr_w1"]
        scaling = 1.0
    return tensors | {"alpha": torch.tensor(float(scaling * rank))}


def network(parts: Iterable[Trained], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """kohya's header fields of rank and alpha, which is the file's own, else the config's.

    "Dynamic" where layers differ.
    """
    layers = [(trained.ranks[name], scaling) for trained in parts for name, scaling in trained.scalings.items()]
    alphas = [float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")]
    values: dict[str, list[float]] = {
        "dim": [rank for rank, _ in layers],
        "alpha": alphas or [rank * scaling for rank, scaling in layers],
    }
    texts = {name: sorted({f"{value:g}" for value in found}) for name, found in values.items()}
    return {f"ss_network_{name}": found[0] if len(found) == 1 else "Dynamic" for name, found in texts.items()}


def comfyui_prefix(component: str, family: Family) -> str:
    """A UNet's text encoders are numbered where a family has several. Source: kohya's sd-scripts, networks/lora*.py."""
    if family.DENOISER == "transformer":
        return f"{component}."
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
    for component in set(family.COMPONENTS) - common.absent(model, family.COMPONENTS):
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
    """In the base's float32 tensors, in place."""
    for name in trained.scalings:
        weights[f"{name}.weight"].copy_(merged(trained, name, weights[f"{name}.weight"]))
    for name, delta in trained.biases.items():
        weights[f"{name}.bias"] += delta
