"""A small reader of adapter files by ComfyUI's key rules, written independently of our writer.

It patches the layers of the original checkpoint, which ComfyUI loads. adapters/original_layout.py defines their names,
which layers of the denoiser are stacked into one, and whose rows have another order. Prefixes of a module ``m``:

- UNet: ``lora_unet_`` + m with underscores.
- Transformer: ``transformer.`` + m.
- CLIP text encoders: ``text_encoder.`` or ``text_encoder_2.`` + m; or ``lora_te1_`` (``lora_te_``) or ``lora_te2_`` + m
  with underscores, from text_model on.

Tensors of a module:

- LoRA: ``lora_up.weight`` (or ``lora_B.weight``) [out, r, ...] times ``lora_down.weight`` (``lora_A.weight``)
  [r, in, ...], scaled by ``alpha`` / r, or by 1. Rows are in diffusers' order and are reordered for the checkpoint.
- ``dora_scale`` [out, 1, ...]: multiplies rows divided by the norms of the base's rows, in the checkpoint's order.
- ``diff_b``: added to the bias.
- LoHa: ``hada_w1_a`` [out, r] times ``hada_w1_b`` [r, in...], multiplied element by element by the product of w2.
  Convolutions have ``hada_t1``, ``hada_t2`` [r, r, k, k] between ``_a`` [r, out] and ``_b`` [r, in].
- LoKr: Kronecker product of ``lokr_w1`` and ``lokr_w2``, each full or ``_a`` times ``_b``. ``alpha`` needs a rank.
  A module with ``lokr_t2`` is not read: ComfyUI up to 0.29.0 logs an error and keeps the base layer.

Everything is multiplied by the strength at which the file is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.adapters import original_layout
from lora_dag.adapters.original_layout import StackedLayer, swap_halves

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
class PatchedWeights:
    """Parameters with a file applied, and the keys of the file that were ignored."""

    weights: Tensors
    """Parameter -> value with the file applied. Names of text encoders begin with ``te1.`` or ``te2.``."""
    unread: list[str]
    """Keys without any meaning for ComfyUI."""


@contextlib.contextmanager
def patched(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Iterator[list[str]]:
    """Apply a file to the weights inside the block and yield the ignored keys. Afterwards the base is restored."""
    patch = read(denoiser, path, strength, text_encoders)
    with swapped_in(parameters(denoiser, text_encoders), patch.weights):
        yield patch.unread


@contextlib.contextmanager
def swapped_in(base: Tensors, weights: Tensors) -> Iterator[None]:
    """Give parameters these values inside the block, and their base values afterwards."""
    originals = {name: base[name].data for name in weights}
    try:
        for name, tensor in weights.items():
            base[name].data = tensor
        yield
    finally:
        for name, tensor in originals.items():
            base[name].data = tensor


def parameters(denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module] = ()) -> Tensors:
    """Return all parameters; names of text encoders begin with ``te1.`` or ``te2.``."""
    parameters: Tensors = dict(denoiser.named_parameters())
    for number, encoder in enumerate(text_encoders, 1):
        parameters |= {f"te{number}.{name}": weight for name, weight in encoder.named_parameters()}
    return parameters


@torch.no_grad()
def read(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> PatchedWeights:
    """Apply a file to each layer of the original checkpoint, and convert the layer back to the denoiser's layout."""
    from safetensors.torch import load_file

    weights: Tensors = {}
    unread, base = load_file(path), parameters(denoiser, text_encoders)
    for layers in original_layers(denoiser, text_encoders):
        changes = {part.name: pop_tensors(unread, part.name) for part in layers}
        if any(tensors.keys() - {"diff_b"} for tensors in changes.values()):
            rows = [reorder_rows(part, base[f"{part.name}.weight"]) for part in layers]
            whole, start = torch.cat(rows), 0
            for part, base_rows in zip(layers, rows, strict=True):
                stacked_rows = whole.narrow(0, start, len(base_rows))
                stacked_rows += strength * full_change(part, stacked_rows, changes[part.name])
                start += len(base_rows)
            split = whole.split([len(base_rows) for base_rows in rows])
            weights |= {f"{part.name}.weight": reorder_rows(part, w) for part, w in zip(layers, split, strict=True)}
        for name, tensors in changes.items():
            if "diff_b" in tensors:
                bias = base[f"{name}.bias"]
                weights[f"{name}.bias"] = bias + strength * tensors["diff_b"].to(bias)
    return PatchedWeights(weights, sorted(unread))


def original_layers(
    denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module]
) -> Iterator[list[StackedLayer]]:
    """Yield the parts that are stacked in each layer of the original checkpoint that can have a key."""
    yield from original_layout.original_layers(denoiser).values()
    for number, encoder in enumerate(text_encoders, 1):
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield [StackedLayer(f"te{number}.{name}", swapped=False)]


def reorder_rows(part: StackedLayer, rows: torch.Tensor) -> torch.Tensor:
    """Convert rows between diffusers' order and the checkpoint's order."""
    return swap_halves(rows) if part.swapped else rows


def pop_tensors(unread: Tensors, module: str) -> Tensors:
    """Remove a module's tensors from ``unread`` and return them by the last part of their keys."""
    return {
        SAME.get(leaf, leaf): unread.pop(f"{prefix}.{leaf}")
        for prefix in keys(module)
        if f"{prefix}.lokr_t2" not in unread
        for leaf in (*LEAVES, "dora_scale", "diff_b")
        if f"{prefix}.{leaf}" in unread
    }


def keys(module: str) -> Iterator[str]:
    """Yield the prefixes that mean the module; ``te1.`` and ``te2.`` are the text encoders."""
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


def full_change(part: StackedLayer, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return what a strength of 1 adds to a module's rows of a layer of the checkpoint."""
    change = reorder_rows(part, low_rank_change(tensors, weight))
    if "dora_scale" not in tensors:
        return change
    norms = torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim())), keepdim=True)
    return (weight + change) * tensors["dora_scale"].to(weight) / (norms + torch.finfo(weight.dtype).eps) - weight


def low_rank_change(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return the scaled product of a module's tensors, in diffusers' order of rows; zeros without tensors."""
    factor: list[Any] = [tensors[leaf] for leaf in RANK_FIRST if leaf in tensors]
    scale = float(tensors["alpha"]) / len(factor[0]) if "alpha" in tensors and factor else 1.0
    if "lora_down.weight" in tensors:
        change = tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
    elif "hada_w1_a" in tensors:
        change = factor_of(tensors, "hada_w1", "hada_t1") * factor_of(tensors, "hada_w2", "hada_t2")
    elif tensors.keys() - {"alpha", "dora_scale", "diff_b"}:
        first, second = factor_of(tensors, "lokr_w1"), factor_of(tensors, "lokr_w2")
        change = torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)
    else:
        return torch.zeros_like(weight)
    return change.reshape(weight.shape).to(weight) * scale


def factor_of(tensors: Tensors, name: str, core: str = "") -> torch.Tensor:
    """Return a factor [out, in, ...]: stored in full, as a b, or as a b with a core between them."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", tensors[core], a, b) if core in tensors else a @ b
