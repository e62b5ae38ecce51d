"""Trained biases, stored as deltas to the base's biases: modes ``none``, ``all``, ``lora_only`` of microsoft/LoRA.

A bias is a parameter whose last name is exactly ``bias``; buffers and names that only contain the word do not count.
The forward pass uses base + scale * delta in the layer's dtype. The base's bias is never overwritten, so that a scale
of 0, or removing the deltas, restores it bit-identically. Deltas are float32 and start at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils import parametrize

KEY = ".bias_delta"  # end of a delta's key in an adapter file: ``...to_out.0.bias_delta``


class BiasDelta(torch.nn.Module):
    """Parametrization of a bias that adds a trained delta."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.delta = torch.nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))
        self.scale = 1.0
        self.enabled = True

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias with the scaled delta, float [C], in the dtype of the input."""
        if not self.enabled or self.scale == 0:
            return bias
        return (bias.float() + self.scale * self.delta).to(bias.dtype)


def add(denoiser: torch.nn.Module, mode: str) -> None:
    """Register a delta of zero on every bias of the mode. The adapter's layers must be injected first."""
    for name in biased(denoiser, mode):
        module = base_module(denoiser, name)
        parametrize.register_parametrization(module, "bias", BiasDelta(module.bias), unsafe=True)


def remove(denoiser: torch.nn.Module, keep: bool = False) -> None:
    """Remove all deltas, which restores the base's parameters.

    Args:
        keep: write the sum of bias and delta into the base's biases.
    """
    for name in deltas(denoiser):
        parametrize.remove_parametrizations(base_module(denoiser, name), "bias", leave_parametrized=keep)


def biased(denoiser: torch.nn.Module, mode: str) -> list[str]:
    """Return the base's names of the modules whose bias the mode trains."""
    modules = {
        name.removesuffix(".base_layer"): module
        for name, module in denoiser.named_modules()
        if isinstance(module._parameters.get("bias"), torch.nn.Parameter) and ".lora_" not in name
    }
    if mode == "lora_only":
        targets = {name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
        return [name for name in modules if name in targets]
    return list(modules) if mode == "all" else []


def base_module(denoiser: torch.nn.Module, name: str) -> Any:
    """Return a module of the base by its name there, without the adapter's layer around it."""
    module = denoiser.get_submodule(name)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def parametrizations(denoiser: torch.nn.Module) -> dict[str, BiasDelta]:
    """Return the parametrization of each module by the base's name of the module."""
    return {
        name.partition(".parametrizations.")[0].removesuffix(".base_layer"): module
        for name, module in denoiser.named_modules()
        if isinstance(module, BiasDelta)
    }


def deltas(denoiser: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the delta of each module by name, float32 [C]."""
    return {name: module.delta for name, module in parametrizations(denoiser).items()}


def state_dict(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the deltas with the keys of an adapter file."""
    return {name + KEY: delta for name, delta in deltas(denoiser).items()}


def load(denoiser: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the deltas of an adapter file into the registered ones."""
    with torch.no_grad():
        for name, delta in deltas(denoiser).items():
            delta.copy_(tensors[name + KEY])


def set_scale(denoiser: torch.nn.Module, scale: float) -> None:
    """Set the factor of all deltas."""
    for module in parametrizations(denoiser).values():
        module.scale = scale


def set_enabled(denoiser: torch.nn.Module, enabled: bool) -> None:
    """Switch all deltas on or off."""
    for module in parametrizations(denoiser).values():
        module.enabled = enabled


def base_name(parameter: str) -> str:
    """Return a parameter's name in the base, without the modules that an adapter adds to the path."""
    return parameter.replace(".base_layer.", ".").replace("parametrizations.bias.original", "bias")
