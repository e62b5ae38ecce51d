"""Randomness is a function, not a state: every draw is keyed by (seed, purpose, step, slot).

A run that is killed and resumed therefore draws what an uninterrupted one would have drawn, with nothing to save.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit number that depends on every argument: blake2b of their text."""
    text = "\x1f".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> torch.Generator:
    """A CPU generator for one draw, such as ``generator(seed, "noise", step, slot)``.

    Always on the CPU, so that a CPU and a GPU run see the same noise.
    """
    import torch

    return torch.Generator().manual_seed(key(seed, purpose, *parts))


def permutation(seed: int, epoch: int, size: int) -> list[int]:
    """The order of one epoch."""
    import torch

    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()


def epoch_position(seed: int, position: int, size: int, _cache: dict[tuple[int, int, int], list[int]] = {}) -> int:
    """Index of the item at a position of the endless, reshuffled sequence of epochs."""
    epoch, offset = divmod(position, size)
    if (seed, epoch, size) not in _cache:
        _cache.clear()
        _cache[seed, epoch, size] = permutation(seed, epoch, size)
    return _cache[seed, epoch, size][offset]
