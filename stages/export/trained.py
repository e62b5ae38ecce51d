"""The trained adapter as the writers need it: tensors, strength per layer, biases, and DoRA's factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_dag.adapters import bias, lora, lycoris, original_layout

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
    swapped: set[str]
    """Layers whose rows are in the other order in the original checkpoint."""

    @property
    def unfusable(self) -> list[str]:
        """Targets without a bias, where others have a trained one: PEFT fuses ``lora_bias`` into none of them."""
        return [name for name in self.scalings if name not in self.biases] if self.biases else []


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
        swapped=original_layout.swapped_layers(module),
    )


def folded(trained: Trained) -> Trained:
    """LoRA at strength 1, with alpha = rank: B has the trained strength in it, for readers that take no alpha.

    LoKr and LoHa are returned as they are.
    """
    if "algo" in trained.config:
        return trained
    scaled = {f"{name}.lora_B.weight": scaling for name, scaling in trained.scalings.items()}
    weights = {name: scaled[name] * t if name in scaled else t for name, t in trained.weights.items()}
    config = at_strength_1(trained.config)
    return replace(trained, config=config, weights=weights, scalings=dict.fromkeys(trained.scalings, 1.0))


def at_strength_1(config: dict[str, Any]) -> dict[str, Any]:
    """peft.LoraConfig's arguments with the alphas that are the ranks."""
    plain = {name: value for name, value in config.items() if name not in ("alpha_pattern", "use_rslora")}
    ranks = config.get("rank_pattern", {})
    return plain | {"lora_alpha": config["r"]} | ({"alpha_pattern": ranks} if ranks else {})


def merged(trained: Trained, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A target's weight with the adapter in it: W + s B A, times DoRA's factors."""
    whole = weight + trained.scalings[name] * product(trained.weights, name).reshape(weight.shape)
    return whole * trained.row_factors[name] if name in trained.row_factors else whole


def product(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """B A of a target, or the product of its other tensors, [out, in * kernel]."""
    if f"{name}.lora_A.weight" not in weights:
        return lycoris.product(weights, name)
    return weights[f"{name}.lora_B.weight"].flatten(1) @ weights[f"{name}.lora_A.weight"].flatten(1)


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """2-norm over all but the output axis, [out, 1, ...]."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
