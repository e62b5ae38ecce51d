"""Randomness is a function, not a state: every draw is keyed by (seed, purpose, step, slot).

A run that is killed and resumed therefore draws what an uninterrupted one would have drawn, with nothing to save.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *parts: int | str) -> int:
    """Return a 63-bit number that depends on every argument: blake2b of their text."""
    text = "\x1f".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> torch.Generator:
    """Return a CPU generator for one draw, such as ``generator(seed, "noise", step, slot)``.

    Always on the CPU, so that a CPU and a GPU run see the same noise.
    """
    import torch

    return torch.Generator().manual_seed(key(seed, purpose, *parts))


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, size: int, purpose: str = "order") -> tuple[int, ...]:
    """Return the order of the images in one epoch."""
    import torch

    return tuple(torch.randperm(size, generator=generator(seed, purpose, epoch)).tolist())
