"""Copies of the adapter at smaller ranks: each keeps the largest singular values of every layer's s B A.

No matrix of that rank is nearer (Eckart & Young 1936). The kept share of the squared singular values is called energy.
reports/export/energy.csv lists it per layer and rank, also for all powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters.adapter_tensors import config_at_strength_1

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_dag.adapters.adapter_tensors import AdapterTensors
    from stages.export.source import Source


@dataclass(frozen=True)
class Factors:
    """The thin SVD of a layer's s B A, float64."""

    u: torch.Tensor
    """[out, r]"""
    s: torch.Tensor
    """[r], in descending order."""
    v: torch.Tensor
    """[r, in * kernel]"""

    def energy(self, rank: int) -> float:
        """Return the share of the squared singular values in the first ``rank``; 1 for a layer without any effect."""
        total = self.s.square().sum()
        return float(self.s[:rank].square().sum() / total) if total > 0 else 1.0


def factors(adapter: AdapterTensors) -> dict[str, Factors]:
    """Return the SVD of every layer. QR decompositions of B and A avoid a matrix of the layer's full size."""
    svd = {}
    for name, scaling in adapter.scalings.items():
        a, b = (adapter.weights[f"{name}.lora_{which}.weight"].flatten(1).double().cpu() for which in "AB")
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(scaling * b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        u, v = q_b @ u, v @ q_a.T
        # A pair of vectors may have either sign: the largest entry of u is made positive.
        signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()  # [1, r]
        svd[name] = Factors(u * signs, s, v * signs.T)
    return svd


def resized(source: Source, svd: Mapping[str, Factors], rank: int) -> Source:
    """Return the adapter at a smaller rank, with alpha = rank, which every reader takes for a strength of 1.

    Layers of an even smaller rank keep it. Biases and DoRA's magnitudes do not change: rows keep their trained length
    and lose only part of their direction. The factors include rsLoRA's square root.
    """
    weights = source.weights
    config = resized_config(source.adapter.lora_config, rank)
    tensors = dict(weights)
    for name, layer in svd.items():
        keys = a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        shape_a, shape_b = (weights[key].shape for key in keys)
        new_rank = min(rank, len(weights[a]))
        root = layer.s[:new_rank].sqrt()
        tensors[a] = (root[:, None] * layer.v[:new_rank]).reshape(new_rank, *shape_a[1:]).float()
        tensors[b] = (layer.u[:, :new_rank] * root).reshape(shape_b[0], new_rank, *shape_b[2:]).float()
    return replace(source, adapter=replace(source.adapter, lora_config=config), weights=tensors)


def resized_config(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the arguments of peft.LoraConfig for the copy."""
    pattern = {key: min(value, rank) for key, value in config.get("rank_pattern", {}).items()}
    return config_at_strength_1(config | {"r": min(config["r"], rank)} | ({"rank_pattern": pattern} if pattern else {}))


def energy_csv(svd: Mapping[str, Factors], ranks: Iterable[int]) -> str:
    """Return CSV text with layer, rank and energy for ``ranks`` and all powers of two below the layer's rank."""
    rows = ["layer,rank,energy"]
    for name, layer in svd.items():
        own_rank = len(layer.s)
        all_ranks = sorted({*ranks, *(2**power for power in range(own_rank.bit_length()))})
        rows += [f"{name},{rank},{layer.energy(rank):.6g}" for rank in all_ranks if rank < own_rank]
    return "\n".join(rows) + "\n"
