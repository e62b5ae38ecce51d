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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

from lora_dag.adapters import original_layout
from lora_dag.adapters.original_layout import StackedLayer, swap_halves

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]

SAME = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
RANK_FIRST = ("lora_down.weight", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Tensors whose first axis is the rank."""
LEAVES = (
    *("alpha", "lora_up.weight", "lora_down.weight", *SAME),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
)


@dataclass(frozen=True)
class Patch:
    """A file for the parameters of a model, and the keys of the file that were ignored."""

    changes: dict[str, Change]
    """Parameter -> function of its base value that returns the value with the file applied. Names of text encoders
    begin with ``te1.`` or ``te2.``."""
    unread: list[str]
    """Keys without any meaning for ComfyUI."""


class Patched(torch.nn.Module):
    """Parametrization that applies a file at each use of a parameter, so that no second copy of weights is kept."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """Return the parameter with the file applied, in the shape and dtype of ``base``."""
        return self.change(base)


@contextlib.contextmanager
def patched(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Iterator[list[str]]:
    """Apply a file to the weights inside the block and yield the ignored keys. Afterwards the base is restored."""
    patch = read(denoiser, path, strength, text_encoders)
    with applied(patch, denoiser, text_encoders):
        yield patch.unread


@contextlib.contextmanager
def applied(patch: Patch, denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module] = ()) -> Iterator[None]:
    """Apply a patch inside the block. The base's parameters are never written, and are restored bit-identically."""
    owners = [(owner(name, denoiser, text_encoders), name.rpartition(".")[2]) for name in patch.changes]
    for (module, leaf), change in zip(owners, patch.changes.values(), strict=True):
        parametrize.register_parametrization(module, leaf, Patched(change), unsafe=True)
    try:
        yield
    finally:
        for module, leaf in owners:
            parametrizations: Any = getattr(module.parametrizations, leaf)
            if len(parametrizations) > 1:  # that of a compact weight stays
                del parametrizations[-1]
            else:
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def owner(parameter: str, denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Return the module that has a parameter of this name."""
    module = parameter.rpartition(".")[0]
    first, _, rest = module.partition(".")
    if first in ("te1", "te2"):
        return text_encoders[int(first[-1]) - 1].get_submodule(rest)
    return denoiser.get_submodule(module)


def read(
    denoiser: torch.nn.Module, path: Path, strength: float = 1.0, text_encoders: Sequence[torch.nn.Module] = ()
) -> Patch:
    """Read a file for each layer of the original checkpoint. Nothing is computed before a parameter is used."""
    from safetensors.torch import load_file

    changes: dict[str, Change] = {}
    unread = load_file(path)
    for part in original_layers(denoiser, text_encoders):
        tensors = pop_tensors(unread, part.name)
        if "diff_b" in tensors:
            changes[f"{part.name}.bias"] = partial(patched_bias, strength=strength, tensors=tensors)
        if tensors.keys() - {"diff_b"}:
            changes[f"{part.name}.weight"] = partial(patched_weight, part=part, strength=strength, tensors=tensors)
    return Patch(changes, sorted(unread))


@torch.no_grad()
def patched_weight(base: torch.Tensor, part: StackedLayer, strength: float, tensors: Tensors) -> torch.Tensor:
    """Patch a module's rows in the order of the original checkpoint, and return them in the denoiser's order."""
    rows = reorder_rows(part, base)
    return reorder_rows(part, rows + strength * full_change(part, rows, tensors))


@torch.no_grad()
def patched_bias(base: torch.Tensor, strength: float, tensors: Tensors) -> torch.Tensor:
    """Return the bias with ``diff_b`` added."""
    return base + strength * tensors["diff_b"].to(base)


def original_layers(denoiser: torch.nn.Module, text_encoders: Sequence[torch.nn.Module]) -> Iterator[StackedLayer]:
    """Yield each part of the original checkpoint's layers that can have a key. A part's change depends only on it."""
    for stack in original_layout.original_layers(denoiser).values():
        yield from stack
    for number, encoder in enumerate(text_encoders, 1):
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield StackedLayer(f"te{number}.{name}", swapped=False)


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
