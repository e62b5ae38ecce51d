"""Trained biases, kept as what they add to the base's own: ``none``, ``all``, ``lora_only`` of microsoft/LoRA.

A bias is a parameter whose leaf name is exactly ``bias``: no buffer, and nothing that merely has the word in its name.
The forward uses base + scale * delta in the layer's dtype; the base's bias is never written, so that a scale of zero,
or taking the deltas off, gives it back bit for bit. Deltas are float32 and start at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils import parametrize

KEY = ".bias_delta"  # how a delta is named in an adapter file: ``...to_out.0.bias_delta``


class BiasDelta(torch.nn.Module):
    """Adds a trained delta to the bias that it is registered on."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.delta = torch.nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))
        self.scale = 1.0
        self.enabled = True

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """float [C] in the layer's dtype -> the same."""
        if not self.enabled or self.scale == 0:
            return bias
        return (bias.float() + self.scale * self.delta).to(bias.dtype)


def add(denoiser: torch.nn.Module, mode: str) -> None:
    """Register a delta of zero on every bias of the mode; the adapter's layers must have been injected before."""
    for name in biased(denoiser, mode):
        module = base_module(denoiser, name)
        parametrize.register_parametrization(module, "bias", BiasDelta(module.bias), unsafe=True)


def remove(denoiser: torch.nn.Module, keep: bool = False) -> None:
    """Take every delta off: the base's parameters are back in their places, untouched.

    Args:
        keep: leave what the deltas add in the base's biases.
    """
    for name in deltas(denoiser):
        parametrize.remove_parametrizations(base_module(denoiser, name), "bias", leave_parametrized=keep)


def biased(denoiser: torch.nn.Module, mode: str) -> list[str]:
    """Names of the modules whose bias the mode trains, as the base names them."""
    modules = {
        name.removesuffix(".base_layer"): module
        for name, module in denoiser.named_modules()
        if isinstance(module._parameters.get("bias"), torch.nn.Parameter) and ".lora_" not in name
    }
    if mode == "lora_only":
        adapted = {name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
        return [name for name in modules if name in adapted]
    return list(modules) if mode == "all" else []


def base_module(denoiser: torch.nn.Module, name: str) -> Any:
    module = denoiser.get_submodule(name)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def parametrizations(denoiser: torch.nn.Module) -> dict[str, BiasDelta]:
    """Module's name, as the base names it -> its parametrization."""
    return {
        name.partition(".parametrizations.")[0].removesuffix(".base_layer"): module
        for name, module in denoiser.named_modules()
        if isinstance(module, BiasDelta)
    }


def deltas(denoiser: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Module's name -> its delta, float32 [C]."""
    return {name: module.delta for name, module in parametrizations(denoiser).items()}


def state_dict(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name + KEY: delta for name, delta in deltas(denoiser).items()}


def load(denoiser: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, delta in deltas(denoiser).items():
            delta.copy_(tensors[name + KEY])


def set_scale(denoiser: torch.nn.Module, scale: float) -> None:
    for module in parametrizations(denoiser).values():
        module.scale = scale


def set_enabled(denoiser: torch.nn.Module, enabled: bool) -> None:
    for module in parametrizations(denoiser).values():
        module.enabled = enabled


def base_name(parameter: str) -> str:
    """A parameter's name in the base, whatever an adapter has put around it."""
    return parameter.replace(".base_layer.", ".").replace("parametrizations.bias.original", "bias")
