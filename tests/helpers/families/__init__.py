"""What tests know of each family, a file each: its tiny pipeline, the stock calls, and the numbers that are recorded.

A file here has, for the family of its name:

``build() -> pipeline``: random weights of the true classes, below 1 M parameters, built offline.
``STOCK``: what the stock pipeline does, called without this project's families; see ``tests/helpers/stock.py``.
``LOSSES``: the first three losses of a training of `tests/families/test_every_family.py`, float32 on a CPU.
``ENCODERS``: ``keys.FORMAT`` and digest of the family's code that decides what the store holds; see
``tests/cache_latents/test_store_keys.py``.
``COMFYUI``: ComfyUI's class of the denoiser, and its config where ComfyUI does not find it in the tensors.
``ORIGINAL_NORMS``: of a transformer, tensors without an adapter that diffusers' converter of checkpoints needs.
``SINGLE_FILE``: the tensors of a checkpoint in one file made of a folder; None where no test makes one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from tests.helpers.stock import Stock


def case(name: str) -> Any:
    """The file of a family; its pipeline's classes are imported with it."""
    return importlib.import_module(f"tests.helpers.families.{name}")


def stock_of(name: str) -> Stock:
    return case(name).STOCK


def save(name: str, folder: Path) -> Path:
    """The family's tiny pipeline in the diffusers layout."""
    torch.manual_seed(0)
    pipeline = case(name).build()
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 1_000_000
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
