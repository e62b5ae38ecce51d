"""LoRA on a denoiser, by PEFT: inject, read out, load, scale. Adapters are float32 whatever the frozen dtype is."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

NAME = "default"


def inject(denoiser: torch.nn.Module, config: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """Add a fresh adapter; return its parameters by name, float32 and requiring gradients. All else stays frozen."""
    denoiser.add_adapter(LoraConfig(**config), adapter_name=NAME)
    trainable = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def state_dict(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, keys as PEFT names them (``...to_q.lora_A.weight``)."""
    return get_peft_model_state_dict(denoiser, adapter_name=NAME)


def load(denoiser: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the injected adapter.

    Raises:
        ValueError: a key is missing or left over.
    """
    missing = set(state_dict(denoiser)) ^ set(tensors)
    if missing:
        raise ValueError(f"adapter keys do not match the injected layers: {sorted(missing)[:4]}")
    set_peft_model_state_dict(denoiser, tensors, adapter_name=NAME)


def set_scale(denoiser: torch.nn.Module, scale: float) -> None:
    """Strength of the adapter: 1 as trained, 0 the base."""
    denoiser.set_adapters([NAME], [scale])


@contextlib.contextmanager
def disabled(denoiser: torch.nn.Module) -> Iterator[None]:
    """The base alone, inside the block."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def targets(denoiser: torch.nn.Module) -> list[str]:
    """Names of the layers that carry the adapter."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]


def frozen_digest(denoiser: torch.nn.Module) -> str:
    """sha256 over all frozen parameters and buffers, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted([*denoiser.named_parameters(), *denoiser.named_buffers()]):
        if not tensor.requires_grad:
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
