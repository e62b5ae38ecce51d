"""Weights of a denoiser in the layers of its original checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from lora_dag.adapters.original_layout import original_layers, swap_halves


def stacked(model: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights and biases of the layers of the original checkpoint."""
    found = {}
    for layer, stack in original_layers(model).items():
        for leaf in ("weight", "bias"):
            rows = [(part.swapped, own.get(f"{part.name}.{leaf}")) for part in stack]
            if all(tensor is not None for _, tensor in rows):
                found[f"{layer}.{leaf}"] = torch.cat([swap_halves(t) if swapped else t for swapped, t in rows])
    return found
