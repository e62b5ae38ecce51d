"""Test data of each family, a file each: a tiny pipeline, calls of the unchanged pipeline, and recorded numbers.

A file here has, for the family of its name:

``build() -> pipeline``: random weights of the true classes, below 1 M parameters, built offline.
``STOCK``: what the stock pipeline says and does, without this project's families: the reference for them.
``LOSSES``: the first three losses of a training of `tests/families/test_every_family.py`, float32 on a CPU.
``ENCODERS``: ``keys.FORMAT`` and digest of the family's code that decides what the store holds; see
``tests/cache_latents/test_store_keys.py``.
``COMFYUI``: ComfyUI's class of the denoiser, and its config where ComfyUI does not find it in the tensors.
``ORIGINAL_NORMS``: of a transformer, tensors without an adapter that diffusers' converter of checkpoints needs.
``SINGLE_FILE``: the tensors of a checkpoint in one file made of a folder; None where no test makes one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stock:
    """Unchanged pipeline of one class."""

    cls: str
    encode: Callable[[Any, list[str]], Tensors]
    """(pipeline, captions) -> what its own ``encode_prompt`` returns without guidance, named as here."""
    call: Callable[[Any, torch.Tensor, torch.Tensor, Tensors], torch.Tensor]
    """(pipeline, noisy latents, timesteps as the model counts them, conditioning) -> the denoiser's output."""
    unpack: Callable[[Any, Any], torch.Tensor] = lambda pipeline, latents: latents
    """(pipeline, what the denoiser takes and returns for a square image) -> [B, C, h, w]."""
    sign: int = 1
    """What the pipeline multiplies the denoiser's output by."""
    options: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments of a call in which the denoiser sees the prompts alone, and sees what training sees."""
    timesteps: Callable[[torch.Tensor], torch.Tensor] = lambda given: given
    """What the denoiser is given -> timesteps as the model counts them."""


def case(name: str) -> Any:
    """Return the file of a family, which imports its pipeline's classes."""
    return importlib.import_module(f"tests.helpers.families.{name}")


def stock_of(name: str) -> Stock:
    return case(name).STOCK


def save(name: str, folder: Path) -> Path:
    """Save the family's tiny pipeline in the diffusers layout."""
    torch.manual_seed(0)
    pipeline = case(name).build()
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 1_000_000
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
