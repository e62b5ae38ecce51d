"""Tensors of a trained adapter for file formats, with rank, strength, bias and DoRA factors of each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_dag.adapters import bias, lora, original_layout

Tensors = dict[str, torch.Tensor]
DORA = ".lora_magnitude_vector"


@dataclass(frozen=True)
class AdapterTensors:
    """Adapter of one module: the denoiser or a text encoder."""

    config: dict[str, Any]
    """Arguments of peft.LoraConfig."""
    weights: Tensors
    """PEFT's tensors (``...lora_A.weight``, ``...lokr_w1``), without the biases."""
    ranks: dict[str, int]
    """Target -> rank."""
    scalings: dict[str, float]
    """Target -> strength: alpha / rank, or alpha / sqrt(rank)."""
    biases: Tensors
    """Module -> change of its bias, float32 [C]."""
    row_factors: Tensors
    """DoRA only. Target -> m / ||W + s B A||, float32 [out, 1, ...]. The weight is this factor times W + s B A."""
    row_norms: Tensors
    """DoRA only. Target -> ||W||, float32 [out, 1, ...]."""
    swapped: set[str]
    """Layers whose halves of rows have the opposite order in the original checkpoint."""

    @property
    def unfusable(self) -> list[str]:
        """Targets without a trained bias while others have one. PEFT cannot fuse ``lora_bias`` into these targets."""
        return [name for name in self.scalings if name not in self.biases] if self.biases else []

    def layer_tensors(self, name: str) -> Tensors:
        """Return the tensors of one target by the end of their keys, such as ``lora_A.weight``."""
        start = f"{name}."
        return {key.removeprefix(start): tensor for key, tensor in self.weights.items() if key.startswith(start)}

    def folded(self) -> AdapterTensors:
        """Return the adapter with alpha = rank and B scaled instead, for programs that do not read alpha.

        LoKr and LoHa are returned unchanged.
        """
        if "algo" in self.config:
            return self
        scaled = {f"{name}.lora_B.weight": scaling for name, scaling in self.scalings.items()}
        weights = {name: scaled[name] * t if name in scaled else t for name, t in self.weights.items()}
        scalings = dict.fromkeys(self.scalings, 1.0)
        return replace(self, config=config_at_strength_1(self.config), weights=weights, scalings=scalings)

    def with_peft_biases(self) -> Tensors:
        """Return PEFT's tensors, with each trained bias as the bias of B, which PEFT multiplies by the layer's scaling.

        A layer without a trained bias gets zeros: ``lora_bias`` applies to all layers of a PEFT adapter or to none.
        """
        tensors = dict(self.weights)
        for name, scaling in self.scalings.items() if self.biases else ():
            zeros = torch.zeros(len(tensors[f"{name}.lora_B.weight"]))
            tensors[f"{name}.lora_B.bias"] = self.biases.get(name, zeros) / scaling
        return tensors

    def peft_config(self, **changes: Any) -> dict[str, Any]:
        """Return PEFT's config as JSON values."""
        if self.biases:
            changes |= {"lora_bias": True, "init_lora_weights": True}  # PEFT rejects a gaussian start with lora_bias
        config = lora.peft_config(self.config, **changes).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


@torch.no_grad()
def read(config: dict[str, Any], module: Any) -> AdapterTensors:
    """Read an adapter from the float32 module that it was loaded into."""
    layers = {name: module.get_submodule(name) for name in lora.target_names(module)}
    weights = {n: t.detach().clone() for n, t in lora.state_dict(module).items() if not n.endswith(bias.KEY)}
    dora = {name: dora_norms(layer) for name, layer in layers.items() if name + DORA in weights}
    return AdapterTensors(
        config=config,
        weights=weights,
        ranks={name: layer.r[lora.NAME] for name, layer in layers.items()},
        scalings={name: layer.scaling[lora.NAME] for name, layer in layers.items()},
        biases={name: delta.detach().clone() for name, delta in bias.deltas(module).items()},
        row_factors={name: weights[name + DORA].reshape(norm.shape) / norm for name, (norm, _) in dora.items()},
        row_norms={name: base_norm for name, (_, base_norm) in dora.items()},
        swapped=original_layout.swapped_layers(module),
    )


def dora_norms(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's ||W + s B A|| and ||W||, as PEFT computes them, over all axes but the output, [out, 1, ...]."""
    weight, magnitude = layer.get_base_layer().weight, layer.lora_magnitude_vector[lora.NAME]
    changes = layer.get_delta_weight(lora.NAME), torch.zeros_like(weight)
    norms = [magnitude.get_weight_norm(weight, change, scaling=1) for change in changes]
    whole, base = (norm.reshape(-1, *[1] * (weight.dim() - 1)) for norm in norms)
    return whole, base


def config_at_strength_1(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of peft.LoraConfig with every alpha equal to its rank."""
    others = {name: value for name, value in config.items() if name not in ("alpha_pattern", "use_rslora")}
    ranks = config.get("rank_pattern", {})
    return others | {"lora_alpha": config["r"]} | ({"alpha_pattern": ranks} if ranks else {})


def kohya_network(parts: Iterable[AdapterTensors], tensors: Tensors) -> dict[str, str]:
    """Return kohya's header fields of rank and alpha; "Dynamic" where layers differ.

    Alphas are read from the file's tensors, else computed from the config.
    """
    layers = [(part.ranks[name], scaling) for part in parts for name, scaling in part.scalings.items()]
    alphas = [float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")]
    values: dict[str, list[float]] = {
        "dim": [rank for rank, _ in layers],
        "alpha": alphas or [rank * scaling for rank, scaling in layers],
    }
    texts = {name: sorted({f"{value:g}" for value in found}) for name, found in values.items()}
    return {f"ss_network_{name}": found[0] if len(found) == 1 else "Dynamic" for name, found in texts.items()}


def tensors_digest(tensors: Tensors) -> str:
    """Return the sha256 over the tensors' bytes in the order of their names; a file of one dtype has the same order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def unloaded_keys(tensors: Tensors, loaded: Tensors) -> list[str]:
    """Return the keys of a file whose tensors are missing in the models that loaded it."""
    return sorted(n for n, t in tensors.items() if n not in loaded or not torch.equal(loaded[n].cpu(), t))
