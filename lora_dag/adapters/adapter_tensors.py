"""A trained adapter as file formats need it: its tensors, and rank, strength, bias and DoRA's factors of each layer."""

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
    """Read off one module that carries an adapter: the denoiser, or a text encoder."""

    config: dict[str, Any]
    """Arguments of peft.LoraConfig."""
    weights: Tensors
    """PEFT's own tensors (``...lora_A.weight``, ``...lokr_w1``), without the biases."""
    ranks: dict[str, int]
    """Target's name -> its rank."""
    scalings: dict[str, float]
    """Target's name -> its strength: alpha / rank, or alpha / sqrt(rank)."""
    biases: Tensors
    """Module's name -> what was added to its bias, float32 [C]."""
    row_factors: Tensors
    """DoRA alone. Target's name -> m / ||W + s B A||, float32 [out, 1, ...]; the layer is it times W + s B A."""
    row_norms: Tensors
    """DoRA alone. Target's name -> ||W||, float32 [out, 1, ...]."""
    swapped: set[str]
    """Layers whose rows are in the other order in the original checkpoint."""

    @property
    def unfusable(self) -> list[str]:
        """Targets without a bias, where others have a trained one: PEFT fuses ``lora_bias`` into none of them."""
        return [name for name in self.scalings if name not in self.biases] if self.biases else []

    def of_layer(self, name: str) -> Tensors:
        """A target's tensors by their last names, such as ``lora_A.weight``."""
        start = f"{name}."
        return {key.removeprefix(start): tensor for key, tensor in self.weights.items() if key.startswith(start)}

    def folded(self) -> AdapterTensors:
        """LoRA at strength 1, with alpha = rank: B has the trained strength in it, for readers that take no alpha.

        LoKr and LoHa are returned as they are.
        """
        if "algo" in self.config:
            return self
        scaled = {f"{name}.lora_B.weight": scaling for name, scaling in self.scalings.items()}
        weights = {name: scaled[name] * t if name in scaled else t for name, t in self.weights.items()}
        scalings = dict.fromkeys(self.scalings, 1.0)
        return replace(self, config=at_strength_1(self.config), weights=weights, scalings=scalings)

    def with_peft_biases(self) -> Tensors:
        """PEFT's tensors with each trained bias as that of B, which PEFT multiplies by the layer's scaling.

        A layer without one gets zeros: ``lora_bias`` holds for all layers of a PEFT adapter or for none.
        """
        tensors = dict(self.weights)
        for name, scaling in self.scalings.items() if self.biases else ():
            zeros = torch.zeros(len(tensors[f"{name}.lora_B.weight"]))
            tensors[f"{name}.lora_B.bias"] = self.biases.get(name, zeros) / scaling
        return tensors

    def peft_config(self, **changes: Any) -> dict[str, Any]:
        """PEFT's config as JSON values."""
        if self.biases:
            changes |= {"lora_bias": True, "init_lora_weights": True}  # PEFT takes no gaussian start beside it
        config = lora.peft_config(self.config, **changes).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


@torch.no_grad()
def read(config: dict[str, Any], module: Any) -> AdapterTensors:
    """From a float32 module into which the adapter was loaded."""
    layers = {name: module.get_submodule(name) for name in lora.targets(module)}
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
    """||W + s B A|| and ||W|| of a layer by PEFT, over all but the output axis, [out, 1, ...]."""
    weight, magnitude = layer.get_base_layer().weight, layer.lora_magnitude_vector[lora.NAME]
    changes = layer.get_delta_weight(lora.NAME), torch.zeros_like(weight)
    norms = [magnitude.get_weight_norm(weight, change, scaling=1) for change in changes]
    whole, base = (norm.reshape(-1, *[1] * (weight.dim() - 1)) for norm in norms)
    return whole, base


def at_strength_1(config: dict[str, Any]) -> dict[str, Any]:
    """peft.LoraConfig's arguments with the alphas that are the ranks."""
    plain = {name: value for name, value in config.items() if name not in ("alpha_pattern", "use_rslora")}
    ranks = config.get("rank_pattern", {})
    return plain | {"lora_alpha": config["r"]} | ({"alpha_pattern": ranks} if ranks else {})


def kohya_network(parts: Iterable[AdapterTensors], tensors: Tensors) -> dict[str, str]:
    """kohya's header fields of rank and alpha, which is the file's own, else the config's.

    "Dynamic" where layers differ.
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
    """sha256 over the tensors' bytes in the order of their names, which is the file's where all have one dtype."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def untaken(tensors: Tensors, taken: Tensors) -> list[str]:
    """Keys of a file whose tensors are not in the models that loaded it."""
    return sorted(n for n, t in tensors.items() if n not in taken or not torch.equal(taken[n].cpu(), t))
