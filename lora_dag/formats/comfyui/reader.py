"""A small reader of adapter files as ComfyUI reads them, written from its key rules and apart from our writer.

It works on the layers of the original checkpoint, which ComfyUI loads: adapters/original_layout.py says how they are
named there, which of the denoiser's are stacked into one, and where rows are in another order. A module ``m`` of a UNet
is named ``lora_unet_`` + m with underscores, one of a transformer ``transformer.`` + m, one of the CLIP text encoders
``text_encoder.`` or ``text_encoder_2.`` + m, or ``lora_te1_`` (``lora_te_``), ``lora_te2_`` + m with underscores, from
text_model on. Of a module:

``lora_up.weight`` (or ``lora_B.weight``) [out, r, ...] and ``lora_down.weight`` (``lora_A.weight``) [r, in, ...], whose
product is scaled by ``alpha`` / r, or by 1. Its rows are in diffusers' order, and are brought into the checkpoint's.
``dora_scale`` [out, 1, ...], which multiplies rows over the norms of the base's rows, in the checkpoint's order.
``diff_b``, added to the bias.
LoHa: ``hada_w1_a`` [out, r] times ``hada_w1_b`` [r, in...], and the same of w2, multiplied element by element;
``hada_t1``, ``hada_t2`` [r, r, k, k] stand between ``_a`` [r, out] and ``_b`` [r, in] of a convolution.
LoKr: the Kronecker product of ``lokr_w1`` and ``lokr_w2``, each whole or ``_a`` times ``_b``; ``alpha`` needs a rank.
A module with ``lokr_t2`` is not read: ComfyUI up to 0.29.0 logs an error, and leaves the layer as the base.
All of it is multiplied by the strength at which the file is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import original_layout
from lora_dag.adapters.original_layout import Part, swap_halves

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

SAME = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
RANK_FIRST = ("lora_down.weight", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Tensors whose first axis is the rank."""
LEAVES = (
    *("alpha", "lora_up.weight", "lora_down.weight", *SAME),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
)


@dataclass(frozen=True)
class Read:
    """What a file makes of the modules' parameters, and what of it they did not take."""

    weights: Tensors
    """Parameter's name -> its value with the file in it; a text encoder's behind ``te1.`` or ``te2.``."""
    unread: list[str]
    """Keys that mean nothing."""


@contextlib.contextmanager
def patched(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Iterator[list[str]]:
    """Inside, the weights are patched; yields the keys that meant nothing. Afterwards the base's are put back."""
    found = read(denoiser, path, strength, text_encoders)
    with in_place(parameters(denoiser, text_encoders), found.weights):
        yield found.unread


@contextlib.contextmanager
def in_place(own: Tensors, weights: Tensors) -> Iterator[None]:
    """Inside, parameters have these values; afterwards their own."""
    kept = {name: own[name].data for name in weights}
    try:
        for name, tensor in weights.items():
            own[name].data = tensor
        yield
    finally:
        for name, tensor in kept.items():
            own[name].data = tensor


def parameters(denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module] = ()) -> Tensors:
    found: Tensors = dict(denoiser.named_parameters())
    for number, encoder in enumerate(text_encoders, 1):
        found |= {f"te{number}.{name}": weight for name, weight in encoder.named_parameters()}
    return found


@torch.no_grad()
def read(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Read:
    """Patch the layers of the original checkpoint, one after the other, and bring each back to the denoiser's."""
    from safetensors.torch import load_file

    weights: Tensors = {}
    unread, own = load_file(path), parameters(denoiser, text_encoders)
    for layers in checkpoint(denoiser, text_encoders):
        changes = {part.name: take(unread, part.name) for part in layers}
        if any(tensors.keys() - {"diff_b"} for tensors in changes.values()):
            rows = [in_other_order(part, own[f"{part.name}.weight"]) for part in layers]
            whole, start = torch.cat(rows), 0
            for part, own_rows in zip(layers, rows, strict=True):
                place = whole.narrow(0, start, len(own_rows))
                place += strength * full_change(part, place, changes[part.name])
                start += len(own_rows)
            split = whole.split([len(own_rows) for own_rows in rows])
            weights |= {f"{part.name}.weight": in_other_order(part, w) for part, w in zip(layers, split, strict=True)}
        for name, tensors in changes.items():
            if "diff_b" in tensors:
                bias = own[f"{name}.bias"]
                weights[f"{name}.bias"] = bias + strength * tensors["diff_b"].to(bias)
    return Read(weights, sorted(unread))


def checkpoint(denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module]) -> Iterator[list[Part]]:
    """The layers of the original checkpoint that have a key, as what is stacked in each."""
    yield from original_layout.parts(denoiser).values()
    for number, encoder in enumerate(text_encoders, 1):
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield [Part(f"te{number}.{name}", swapped=False)]


def in_other_order(part: Part, rows: torch.Tensor) -> torch.Tensor:
    """From diffusers' order of rows to the checkpoint's, and back."""
    return swap_halves(rows) if part.swapped else rows


def take(unread: Tensors, module: str) -> Tensors:
    """A module's tensors by what they are, taken out of ``unread``."""
    return {
        SAME.get(leaf, leaf): unread.pop(f"{prefix}.{leaf}")
        for prefix in keys(module)
        if f"{prefix}.lokr_t2" not in unread
        for leaf in (*LEAVES, "dora_scale", "diff_b")
        if f"{prefix}.{leaf}" in unread
    }


def keys(module: str) -> Iterator[str]:
    """Those that mean the module; ``te1.`` and ``te2.`` are the text encoders."""
    first, _, rest = module.partition(".")
    if first in ("te1", "te2"):
        name = f"text_model.{rest.removeprefix('text_model.')}"
        yield f"text_encoder{'_2' if first == 'te2' else ''}.{name}"
        yield f"lora_{first}_{name.replace('.', '_')}"
        if first == "te1":
            yield f"lora_te_{name.replace('.', '_')}"
    else:
        yield f"lora_unet_{module.replace('.', '_')}"
        yield f"transformer.{module}"


def full_change(part: Part, weight: torch.Tensor, found: Tensors) -> torch.Tensor:
    """What strength 1 adds to a module's rows of a checkpoint's layer."""
    change = in_other_order(part, low_rank_change(found, weight))
    if "dora_scale" not in found:
        return change
    norms = torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim())), keepdim=True)
    return (weight + change) * found["dora_scale"].to(weight) / (norms + torch.finfo(weight.dtype).eps) - weight


def low_rank_change(found: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """The scaled product of a module's tensors, in the order of their rows; zeros where there are none."""
    factor: list[Any] = [found[leaf] for leaf in RANK_FIRST if leaf in found]
    scale = float(found["alpha"]) / len(factor[0]) if "alpha" in found and factor else 1.0
    if "lora_down.weight" in found:
        change = found["lora_up.weight"].flatten(1) @ found["lora_down.weight"].flatten(1)
    elif "hada_w1_a" in found:
        change = factor_of(found, "hada_w1", "hada_t1") * factor_of(found, "hada_w2", "hada_t2")
    elif found.keys() - {"alpha", "dora_scale", "diff_b"}:
        first, second = factor_of(found, "lokr_w1"), factor_of(found, "lokr_w2")
        change = torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)
    else:
        return torch.zeros_like(weight)
    return change.reshape(weight.shape).to(weight) * scale


def factor_of(found: Tensors, name: str, core: str = "") -> torch.Tensor:
    """Whole, a b, or with a core between them: [out, in, ...]."""
    if name in found:
        return found[name]
    a, b = found[f"{name}_a"], found[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", found[core], a, b) if core in found else a @ b
