"""LoRA on a denoiser, by PEFT: inject, read out, load, scale. Adapters are float32 whatever the frozen dtype is."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from stages.core import seeding
from stages.core.console import UserError

if TYPE_CHECKING:
    from stages.train.params import LoraParams

NAME = "default"


def make_config(params: LoraParams, denoiser: Any) -> dict[str, Any]:
    """Arguments of peft.LoraConfig for this denoiser.

    Raises:
        UserError: a target that matches no layer, with the nearest names; a rank above a layer's size.
    """
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    problems = []
    for target in params.target_modules:
        matched = [module for name, module in layers.items() if name == target or name.endswith(f".{target}")]
        if not matched:
            endings = sorted({ending(name) for name in layers})
            near = difflib.get_close_matches(target, endings, n=3, cutoff=0.3) or endings[:8]
            problems.append(
                f"params.yaml lora.target_modules: '{target}' matches no layer of {type(denoiser).__name__} "
                f"(near: {', '.join(near)})"
            )
        smallest = min((min(module.weight.shape[:2]) for module in matched), default=params.rank)
        if params.rank > smallest:
            problems.append(f"params.yaml lora.rank: {params.rank} is above {smallest}, the size of a '{target}' layer")
    if problems:
        raise UserError(*problems)
    return {
        "r": params.rank,
        "lora_alpha": params.alpha,
        "lora_dropout": params.dropout,
        "target_modules": sorted(params.target_modules),
        "init_lora_weights": "gaussian" if params.init_lora_weights == "gaussian" else True,
        "bias": "none",
    }


def ending(name: str) -> str:
    """``down_blocks.0.attn1.to_out.0`` -> ``to_out.0``: what a person writes in target_modules."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def keyed_init(denoiser: Any, config: dict[str, Any], seed: int) -> None:
    """PEFT's own initialisation, layer by layer, keyed by the layer's name: other targets do not change it."""
    for name in targets(denoiser):
        torch.manual_seed(seeding.key(seed, "lora_init", name))
        denoiser.get_submodule(name).reset_lora_parameters(NAME, config["init_lora_weights"])


def inject(denoiser: Any, config: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """Add a fresh adapter; return its parameters by name, float32 and requiring gradients. All else stays frozen."""
    denoiser.add_adapter(LoraConfig(**config), adapter_name=NAME)
    trainable = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def state_dict(denoiser: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors, keys as PEFT names them (``...to_q.lora_A.weight``)."""
    return get_peft_model_state_dict(denoiser, adapter_name=NAME)


def load(denoiser: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the injected adapter.

    Raises:
        ValueError: a key is missing or left over.
    """
    missing = set(state_dict(denoiser)) ^ set(tensors)
    if missing:
        raise ValueError(f"adapter keys do not match the injected layers: {sorted(missing)[:4]}")
    set_peft_model_state_dict(denoiser, tensors, adapter_name=NAME)


def set_scale(denoiser: Any, scale: float) -> None:
    """Strength of the adapter: 1 as trained, 0 the base."""
    denoiser.set_adapters([NAME], [scale])


@contextlib.contextmanager
def disabled(denoiser: Any) -> Iterator[None]:
    """The base alone, inside the block."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def targets(denoiser: Any) -> list[str]:
    """Names of the layers that carry the adapter."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]


def require_sound(denoiser: Any, trainable: dict[str, torch.nn.Parameter]) -> None:
    """Every trained parameter is float32 and part of what is saved.

    Raises:
        RuntimeError: naming the first that is not.
    """
    saved = {tensor.data_ptr() for tensor in state_dict(denoiser).values()}
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} is {parameter.dtype}, not float32")
        if parameter.data_ptr() not in saved:
            raise RuntimeError(f"{name} is trained but would not be saved")


def frozen_digest(denoiser: Any) -> str:
    """sha256 over the base's parameters and buffers by their names, the same with and without an adapter."""
    total = hashlib.sha256()
    for name, tensor in sorted([*denoiser.named_parameters(), *denoiser.named_buffers()], key=lambda pair: pair[0]):
        if not tensor.requires_grad:
            total.update(name.replace(".base_layer.", ".").encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
