"""ComfyUI itself, from the checkout that COMFYUI names: its model classes, key maps, loader and patcher, on the CPU.

Packages that ComfyUI imports for images, sound and video are replaced where they are not installed: no adapter passes
through them. Not ComfyUI's code, which stays where it is: its license is another than this repository's.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lora_dag.core.tensors import save_tensors
from lora_dag.families.protocol import load_family
from tests.helpers.families import case

Tensors = dict[str, torch.Tensor]

REPLACED = ("torchvision", "torchaudio", "torchsde", "av", "comfy_aimdo", "comfy_kitchen")


class Replacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of REPLACED that nothing else has found."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_replaced = name.partition(".")[0] in REPLACED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_replaced else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return mock.MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: object) -> None: ...


def version() -> str:
    return runpy.run_path(str(Path(os.environ["COMFYUI"]) / "comfyui_version.py"))["__version__"]


def load() -> Any:
    """The package ``comfy``, whose command line is this."""
    if "comfy" not in sys.modules:
        sys.path.append(os.environ["COMFYUI"])
        sys.meta_path.append(Replacement())
        with mock.patch.object(sys, "argv", ["comfyui"]):
            importlib.import_module("comfy.cli_args").args.cpu = True  # type: ignore[attr-defined]
            for name in ("clip_model", "lora", "model_detection", "model_patcher", "ops", "sd", "supported_models"):
                importlib.import_module(f"comfy.{name}")
    return sys.modules["comfy"]


@dataclass
class Clip:
    """What ``load_lora_for_models`` needs of ComfyUI's CLIP."""

    cond_stage_model: torch.nn.Module
    patcher: Any

    def clone(self) -> Clip:
        return Clip(self.cond_stage_model, self.patcher.clone())

    def add_patches(self, *arguments: Any) -> Any:
        return self.patcher.add_patches(*arguments)


def model(family: str, tensors: Tensors) -> Any:
    """ComfyUI's model with the tensors of an original checkpoint's denoiser."""
    comfy = load()
    cls, found = case(family).COMFYUI
    found = found or comfy.model_detection.detect_unet_config(dict(tensors), "")
    if family == "flux":
        fields = importlib.import_module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__
        found = {name: value for name, value in found.items() if name in fields or name == "image_model"}
    config = getattr(comfy.supported_models, cls)(found)
    if load_family(family).DENOISER == "unet":
        config.unet_config |= {"num_head_channels": 8, "num_heads": -1}
    made = config.get_model({}, "", device="cpu")
    for name, tensor in tensors.items():  # a tiny base's sizes are not all ComfyUI's
        comfy.utils.set_attr_param(made.diffusion_model, name, tensor.clone())
    return made


def encoders(configs: list[Any]) -> torch.nn.Module:
    """ComfyUI's text models, CLIP-L and then CLIP-G, as ``cond_stage_model`` has them."""
    comfy, holder = load(), torch.nn.Module()
    for name, config in zip(("clip_l", "clip_g"), configs, strict=False):
        part = torch.nn.Module()
        part.transformer = comfy.clip_model.CLIPTextModel(
            config.to_dict(), torch.float32, "cpu", comfy.ops.disable_weight_init
        )
        setattr(holder, name, part)
    return holder


def patched(denoiser: Any, text: torch.nn.Module, file: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Load a file as the node LoraLoader does, at strength 1; each patched weight and bias by ComfyUI's name."""
    comfy = load()

    def patcher(module: Any) -> Any:
        return comfy.model_patcher.ModelPatcher(module, load_device=CPU, offload_device=CPU)

    with torch.no_grad():
        loaded, clip = comfy.sd.load_lora_for_models(patcher(denoiser), Clip(text, patcher(text)), file, 1.0, 1.0)
        for each in (loaded, clip.patcher):
            for key in each.patches:
                before = comfy.utils.get_attr(each.model, key).data
                each.patch_weight_to_device(key)
                yield key, comfy.utils.get_attr(each.model, key).data
                comfy.utils.set_attr_param(each.model, key, before)


CPU = torch.device("cpu")


# One layer of each kind, with ComfyUI's own answer: what a test without ComfyUI holds our reader to

ANSWERS = Path(__file__).with_name("comfyui_answers.safetensors")
LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 6), "alpha": ()},
    "lora, no alpha": {"lora_B.weight": (8, 2), "lora_A.weight": (2, 6)},
    "lora, conv": {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 6, 3, 3), "alpha": ()},
    "dora": {"lora_B.weight": (8, 2), "lora_A.weight": (2, 6), "dora_scale": (8, 1)},
    "dora, conv": {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 6, 3, 3), "dora_scale": (8, 1, 1, 1)},
    "dora, swapped": {"lora_B.weight": (8, 2), "lora_A.weight": (2, 6), "dora_scale": (8, 1)},
    "lora, swapped": {"lora_B.weight": (8, 2), "lora_A.weight": (2, 6)},
    "lokr, whole": {"lokr_w1": (2, 2), "lokr_w2": (4, 3), "alpha": ()},
    "lokr, second of the rank": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3), "alpha": ()},
    "lokr, both of the rank": {
        **{"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3), "alpha": ()}
    },
    "lokr, whole conv": {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 3, 3), "alpha": ()},
    "lokr, conv of the rank": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 27), "alpha": ()},
    "lokr, tucker": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 3), "lokr_t2": (2, 2, 3, 3), "alpha": ()},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6), "alpha": ()},
    "loha, tucker": {
        **{"hada_w1_a": (2, 8), "hada_w1_b": (2, 6), "hada_t1": (2, 2, 3, 3)},
        **{"hada_w2_a": (2, 8), "hada_w2_b": (2, 6), "hada_t2": (2, 2, 3, 3), "alpha": ()},
    },
}
"""Kind -> shapes of its tensors; the layer has 8 outputs and 6 inputs."""


def answers() -> Tensors:
    """``kind/weight``, ``kind/`` and its tensors, and ``kind/answer``, by ComfyUI."""
    comfy, found = load(), {}
    for kind, shapes in LAYERS.items():
        generator = torch.Generator().manual_seed(len(found))
        is_conv = "conv" in kind or "tucker" in kind
        weight = torch.randn(8, 6, *([3, 3] if is_conv else []), generator=generator)
        tensors = {leaf: torch.randn(shape, generator=generator) for leaf, shape in shapes.items()}
        loaded = comfy.lora.load_lora({f"x.{leaf}": tensor for leaf, tensor in tensors.items()}, {"x": "x.weight"})
        function = comfy.utils.swap_scale_shift if "swapped" in kind else None
        patches = [(1.0, loaded["x.weight"], 1.0, None, function)]
        answer = comfy.lora.calculate_weight(patches, weight.clone(), "x.weight")
        found |= {f"{kind}/{name}": t for name, t in (tensors | {"weight": weight, "answer": answer}).items()}
    return found


if __name__ == "__main__":  # COMFYUI=/path/to/ComfyUI python -m tests.helpers.comfyui records them
    save_tensors(ANSWERS, answers(), {"reader": f"ComfyUI {version()}"})
