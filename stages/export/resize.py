"""Copies of the adapter at smaller ranks: of each layer's s B A, the largest singular values are kept.

No matrix of that rank is nearer (Eckart & Young 1936). The share of the squared singular values that is kept, called
energy, is in reports/export/energy.csv for each layer, at every power of two as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters.adapter_tensors import at_strength_1

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
    """[r], falling."""
    v: torch.Tensor
    """[r, in * kernel]"""

    def energy(self, rank: int) -> float:
        """Share of the sum of squares in the first singular values; 1 for a layer that changes nothing."""
        total = self.s.square().sum()
        return float(self.s[:rank].square().sum() / total) if total > 0 else 1.0


def factors(adapter: AdapterTensors) -> dict[str, Factors]:
    """Of every layer, through the triangles of B and A: no matrix of the layer's own size is made."""
    found = {}
    for name, scaling in adapter.scalings.items():
        a, b = (adapter.weights[f"{name}.lora_{which}.weight"].flatten(1).double().cpu() for which in "AB")
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(scaling * b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        u, v = q_b @ u, v @ q_a.T
        # A pair of vectors may have either sign: the largest entry of u is made positive.
        signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()  # [1, r]
        found[name] = Factors(u * signs, s, v * signs.T)
    return found


def resized(source: Source, svd: Mapping[str, Factors], rank: int) -> Source:
    """The adapter at a rank, with an alpha of the same number: any reader takes that for a strength of 1.

    Layers of a smaller rank keep theirs. Biases and DoRA's magnitudes stay as they are: rows keep the trained length,
    and what is cut is their direction. rsLoRA's root is in the factors.
    """
    weights = source.weights
    config = resized_config(source.adapter.lora_config, rank)
    tensors = dict(weights)
    for name, found in svd.items():
        keys = a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        shape_a, shape_b = (weights[key].shape for key in keys)
        kept = min(rank, len(weights[a]))
        root = found.s[:kept].sqrt()
        tensors[a] = (root[:, None] * found.v[:kept]).reshape(kept, *shape_a[1:]).float()
        tensors[b] = (found.u[:, :kept] * root).reshape(shape_b[0], kept, *shape_b[2:]).float()
    return replace(source, adapter=replace(source.adapter, lora_config=config), weights=tensors)


def resized_config(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """peft.LoraConfig's arguments of the copy."""
    pattern = {key: min(value, rank) for key, value in config.get("rank_pattern", {}).items()}
    return at_strength_1(config | {"r": min(config["r"], rank)} | ({"rank_pattern": pattern} if pattern else {}))


def energy_csv(svd: Mapping[str, Factors], ranks: Iterable[int]) -> str:
    """Layer, rank, energy: for each rank of export.resized_ranks, and each power of two, below the layer's own."""
    rows = ["layer,rank,energy"]
    for name, found in svd.items():
        own = len(found.s)
        all_ranks = sorted({*ranks, *(2**power for power in range(own.bit_length()))})
        rows += [f"{name},{rank},{found.energy(rank):.6g}" for rank in all_ranks if rank < own]
    return "\n".join(rows) + "\n"
