"""Adapters of the tiny bases, mostly Stable Diffusion: settings, layers, and files as after a long training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel

from lora_dag.adapters import bias, lora
from lora_dag.adapters.params import LoraParams
from lora_dag.artifacts.adapter import FINAL, Adapter, bias_metadata
from lora_dag.bases import component_files
from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_file
from lora_dag.core.params import ModelParams
from lora_dag.core.params import load as load_params
from lora_dag.core.tensors import save_tensors
from lora_dag.families import sd
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from lora_dag.formats.comfyui import reader
from tests.helpers.workspace import Workspace

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PLAIN: dict[str, Any] = {
    "algo": "lora",
    "rank": 2,
    "alpha": 4.0,
    "dropout": 0.0,
    "target_modules": TARGETS,
    "exclude_modules": [],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": "gaussian",
    "bias": "none",
    "init_from": None,
    "decompose_factor": None,
    "decompose_both": False,
    "use_effective_conv2d": False,
    "train_text_encoder": False,
}


def load(base: Path, dtype: Any = "float32") -> torch.nn.Module:
    model = ModelParams(family="sd", pretrained=str(base), variant=None, dtype=dtype, quantization=None)
    return sd.load_denoiser(model, torch.device("cpu"))


def params(**changes: Any) -> LoraParams:
    return LoraParams(**PLAIN | changes)


def inject(denoiser: torch.nn.Module, seed: int = 0, **changes: Any) -> dict[str, torch.nn.Parameter]:
    config = lora.make_config(params(**changes), denoiser)
    trainable = lora.inject(denoiser, config)
    lora.keyed_init(denoiser, config, seed)
    return trainable


def fill(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Fill the parameters with random values, as after a training: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable.values():
        parameter.data = torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    dtype = next(p for name, p in denoiser.named_parameters() if "lora_" not in name).dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prompt = {"prompt_embeds": torch.randn(2, 20, 32, generator=generator)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return sd.predict(denoiser, latents, torch.tensor([0, 999]), prompt)


def refusal(denoiser: torch.nn.Module, **changes: Any) -> tuple[Problem, ...]:
    """Return the problems of a config for the denoiser."""
    with pytest.raises(UserError) as caught:
        lora.make_config(params(**changes), denoiser)
    return caught.value.problems


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # [32, 32]
CONV = "up_blocks.0.resnets.0.conv1"  # [32, 64, 3, 3]
ALGOS: dict[str, dict[str, Any]] = {
    "lokr": {"algo": "lokr"},  # [4, 4] (x) [8, 8], the second of the rank
    "lokr-both": {"algo": "lokr", "decompose_factor": 16, "decompose_both": True},
    "lokr-whole": {"algo": "lokr", "rank": 4, "decompose_factor": 4},
    "lokr-tucker": {"algo": "lokr", "use_effective_conv2d": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_effective_conv2d": True},
}


def algo(name: str, **changes: Any) -> dict[str, Any]:
    """Return section lora with an algorithm, on linear layers and convolutions."""
    return (
        {"init_lora_weights": "kaiming", "target_modules": ["to_q", "to_k", "to_out.0", "conv1"]}
        | ALGOS[name]
        | changes
    )


ADAPTER = Path("data/adapter")
COMFYUI = Path("data/export/comfyui/ink-icons.safetensors")
FORMATS = ["diffusers", "peft", "comfyui", "merged"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5.0}},
    "dora": {"use_dora": True},
    "conv": {"target_modules": "all-linear+conv"},
    "dora-conv": {"target_modules": "all-linear+conv", "use_dora": True},
}


def unet() -> Any:
    model = load_params(Path("params.yaml")).section(ModelParams)
    return sd.load_denoiser(model, torch.device("cpu"))


def adapt(workspace: Workspace, **changes: Any) -> torch.nn.Module:
    """Write data/adapter as after a long training, alpha twice the rank; return the denoiser with it."""
    denoiser = unet()
    config = lora.make_config(params(**changes), denoiser)
    trainable = lora.inject(denoiser, config)
    lora.keyed_init(denoiser, config, 0)
    for name, parameter in trainable.items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, "test", name))
    biases = list(bias.deltas(denoiser))
    metadata = {"format": "pt"} | bias_metadata(config["bias"], biases)
    save_tensors(ADAPTER / FINAL, lora.state_dict(denoiser), metadata)
    base = component_files.digests(load_params(Path("params.yaml")).section(ModelParams), sd.COMPONENTS)
    Adapter(config, base, 4, [], {FINAL: sha256_file(ADAPTER / FINAL)}, biases).save(ADAPTER)
    return denoiser


def adapt_family(family: str, **changes: Any) -> list[str]:
    """Write data/adapter as after a long training; return the modules with a trained bias (not Z-Image's attention)."""
    config = load_params(Path("params.yaml"), [f"model.family={family}"])
    model, module = config.section(ModelParams), load_family(family)
    denoiser = module.load_denoiser(model, torch.device("cpu"))
    lora_config = lora.make_config(params(**changes), denoiser)
    trainable = lora.inject(denoiser, lora_config)
    lora.keyed_init(denoiser, lora_config, 0)
    for name, parameter in trainable.items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, "test", name))
    biases = list(bias.deltas(denoiser))
    save_tensors(
        ADAPTER / FINAL, lora.state_dict(denoiser), {"format": "pt"} | bias_metadata(lora_config["bias"], biases)
    )
    base = component_files.digests(model, module.COMPONENTS)
    Adapter(lora_config, base, 4, [], {FINAL: sha256_file(ADAPTER / FINAL)}, biases).save(ADAPTER)
    return biases


def loaded(name: str) -> torch.Tensor:
    """What a fresh base answers with the file, by other people's code where there is some."""
    if name == "diffusers":
        pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
        pipeline.load_lora_weights("data/export/diffusers")
        return predict(pipeline.unet)
    if name == "peft":
        return predict(PeftModel.from_pretrained(unet(), "data/export/peft").get_base_model())
    if name == "merged":
        return predict(UNet2DConditionModel.from_pretrained("data/export/merged", subfolder="unet"))
    denoiser = unet()
    with reader.patched(denoiser, COMFYUI) as unread:
        assert unread == []
        return predict(denoiser)


def kind(**changes: Any) -> AdapterKind:
    """A LoRA of rank 4 in a UNet, but for ``changes``."""
    return replace(AdapterKind("lora", "none", False, 4, "unet", False), **changes)
