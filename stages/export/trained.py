"""The trained adapter as the writers need it: tensors, strength per layer, biases, and DoRA's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stages.core import bias, lora, lycoris

DORA = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Trained:
    """Read off a module that carries an adapter: the denoiser, or a text encoder."""

    config: dict[str, Any]
    """Arguments of peft.LoraConfig."""
    weights: dict[str, torch.Tensor]
    """PEFT's own tensors (``...lora_A.weight``, ``...lokr_w1``), without the biases."""
    ranks: dict[str, int]
    """Target's name -> its rank."""
    scalings: dict[str, float]
    """Target's name -> what ``product`` is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    biases: dict[str, torch.Tensor]
    """Module's name -> what was added to its bias, float32 [C]."""
    row_factors: dict[str, torch.Tensor]
    """DoRA alone. Target's name -> m / ||W + s B A||, float32 [out, 1, ...]; the layer is it times W + s B A."""
    row_norms: dict[str, torch.Tensor]
    """DoRA alone. Target's name -> ||W||, float32 [out, 1, ...]."""


def read(config: dict[str, Any], module: Any) -> Trained:
    """From a float32 module into which the adapter was loaded."""
    layers = {name: module.get_submodule(name) for name in lora.targets(module)}
    weights = {n: t.detach().clone() for n, t in lora.state_dict(module).items() if not n.endswith(bias.KEY)}
    factors, norms = {}, {}
    for name, layer in layers.items():
        if name + DORA in weights:
            base = layer.get_base_layer().weight.detach()
            scaled = base + layer.scaling[lora.NAME] * product(weights, name).reshape(base.shape)
            norms[name] = row_norm(base)
            factors[name] = weights[name + DORA].reshape(norms[name].shape) / row_norm(scaled)
    return Trained(
        config=config,
        weights=weights,
        ranks={name: layer.r[lora.NAME] for name, layer in layers.items()},
        scalings={name: layer.scaling[lora.NAME] for name, layer in layers.items()},
        biases={name: delta.detach().clone() for name, delta in bias.deltas(module).items()},
        row_factors=factors,
        row_norms=norms,
    )


def product(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """B A of a target, or the product of its other tensors, [out, in * kernel]."""
    if f"{name}.lora_A.weight" not in weights:
        return lycoris.product(weights, name)
    return weights[f"{name}.lora_B.weight"].flatten(1) @ weights[f"{name}.lora_A.weight"].flatten(1)


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """2-norm over all but the output axis, [out, 1, ...]."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
