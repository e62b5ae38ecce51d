"""A small reader of adapter files as ComfyUI reads them, written from its key rules and apart from our writer.

A module ``m`` of a UNet is named ``lora_unet_`` + m with underscores, one of a transformer ``transformer.`` + m, one of
the CLIP text encoders ``lora_te1_`` (or ``lora_te_``) or ``lora_te2_`` + m with underscores, from text_model on:
``lora_up.weight`` [out, r, ...] and ``lora_down.weight`` [r, in, ...], whose product is scaled by ``alpha`` / r;
``dora_scale`` [out, 1, ...], which multiplies rows over the norms of the base's rows; ``diff_b``, added to the bias.
LoHa: ``hada_w1_a`` [out, r] times ``hada_w1_b`` [r, in...], and the same of w2, multiplied element by element.
LoKr: the Kronecker product of ``lokr_w1`` and ``lokr_w2``, each whole or ``_a`` times ``_b``; ``alpha`` needs a rank.
``hada_t1``, ``hada_t2``, ``lokr_t2`` [r, r, k, k] stand between ``_a`` [r, out] and ``_b`` [r, in] of a convolution.
All of it is multiplied by the strength at which the file is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

RANK_FIRST = ("lora_down.weight", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Tensors whose first axis is the rank."""
LEAVES = (
    *("alpha", "lora_up.weight", "lora_down.weight"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
)


@contextlib.contextmanager
def patched(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Iterator[list[str]]:
    """Inside, the weights are patched; yields the keys that meant nothing. Afterwards the base's are put back."""
    from safetensors.torch import load_file

    unread = load_file(path)
    parameters = dict(denoiser.named_parameters())
    for number, encoder in enumerate(text_encoders, 1):
        parameters |= {f"te{number}.{name}": weight for name, weight in encoder.named_parameters()}
    patches = {}
    for name, weight in parameters.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        for prefix in keys(module):
            rows = unread.pop(f"{prefix}.dora_scale", None)
            if (change := read_change(unread, prefix, weight)) is not None:
                patches[name] = weight + strength * full_change(weight, change, rows)
            if (delta := unread.pop(f"{prefix}.diff_b", None)) is not None:
                bias = parameters[f"{module}.bias"]
                patches[f"{module}.bias"] = bias + strength * delta.to(bias)
    kept = {name: parameters[name].data for name in patches}
    try:
        for name, tensor in patches.items():
            parameters[name].data = tensor.detach()
        yield sorted(unread)
    finally:
        for name, tensor in kept.items():
            parameters[name].data = tensor


def read_change(unread: dict[str, torch.Tensor], prefix: str, weight: torch.Tensor) -> torch.Tensor | None:
    """What a module's tensors add to its weight, scaled; None where there are none. Takes them out of ``unread``."""
    found = {leaf: unread.pop(f"{prefix}.{leaf}") for leaf in LEAVES if f"{prefix}.{leaf}" in unread}
    alpha = found.pop("alpha", None)
    factor = [found[leaf] for leaf in RANK_FIRST if leaf in found]
    scale = float(alpha) / len(factor[0]) if alpha is not None and factor else 1.0
    if "lora_down.weight" in found:
        change = found["lora_up.weight"].flatten(1) @ found["lora_down.weight"].flatten(1)
    elif "hada_w1_a" in found:
        change = factor_of(found, "hada_w1", "hada_t1") * factor_of(found, "hada_w2", "hada_t2")
    elif found:
        first, second = factor_of(found, "lokr_w1"), factor_of(found, "lokr_w2", "lokr_t2")
        change = torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second.contiguous())
    else:
        return None
    return change.reshape(weight.shape).to(weight) * scale


def factor_of(found: dict[str, torch.Tensor], name: str, core: str = "") -> torch.Tensor:
    """Whole, a b, or with a core between them: [out, in, ...]."""
    if name in found:
        return found[name]
    a, b = found[f"{name}_a"], found[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", found[core], a, b) if core in found else a @ b


def keys(module: str) -> Iterator[str]:
    """Those that mean the module, ``te1.`` and ``te2.`` standing for the text encoders."""
    first, _, rest = module.partition(".")
    if first in ("te1", "te2"):
        name = f"text_model.{rest.removeprefix('text_model.')}".replace(".", "_")
        yield f"lora_{first}_{name}"
        if first == "te1":
            yield f"lora_te_{name}"
    else:
        yield f"lora_unet_{module.replace('.', '_')}"
        yield f"transformer.{module}"


def full_change(weight: torch.Tensor, change: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """What strength 1 adds to a weight."""
    if rows is None:
        return change
    norms = torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim())), keepdim=True)
    return (weight + change) * rows.to(weight) / (norms + torch.finfo(weight.dtype).eps) - weight
