"""A small reader of LoRA files as ComfyUI reads them, written from its key rules and apart from our writer.

A module ``m`` of a UNet is named ``lora_unet_`` + m with underscores, one of a transformer ``transformer.`` + m, one of
the CLIP text encoders ``lora_te1_`` (or ``lora_te_``) or ``lora_te2_`` + m with underscores, from text_model on:
``lora_up.weight`` [out, r, ...] and ``lora_down.weight`` [r, in, ...], whose product is scaled by ``alpha`` / r;
``dora_scale`` [out, 1, ...], which multiplies rows over the norms of the base's rows; ``diff_b``, added to the bias.
All of it is multiplied by the strength at which the file is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path


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
            down, up = unread.pop(f"{prefix}.lora_down.weight", None), unread.pop(f"{prefix}.lora_up.weight", None)
            alpha, rows = unread.pop(f"{prefix}.alpha", None), unread.pop(f"{prefix}.dora_scale", None)
            if down is not None and up is not None:
                factor = 1.0 if alpha is None else float(alpha) / len(down)
                change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight) * factor
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
