"""Section ``cache``: how the frozen encoders process images and captions."""

from __future__ import annotations

from pydantic import Field

from lora_dag.core.console import Problem
from lora_dag.core.params import Params


class CacheParams(Params):
    """Section ``cache``."""

    batch_size: int = Field(ge=1, le=1024)
    """Images or captions per forward pass. It is part of every cache key, because another size changes the last
    bits (2e-6 in float32)."""
    num_variants: int = Field(ge=1, le=1000)
    """Views per image (crops and mirrored copies). All are encoded; each training step uses one at random."""
    tiling: bool
    """Whether large images are encoded in overlapping tiles: less memory, slightly different latents."""


def flip_problems(flip: bool, cache: CacheParams) -> list[Problem]:
    """Return a problem if ``dataset.flip`` is true but no image has a second view to mirror."""
    if not flip or cache.num_variants > 1:
        return []
    return [
        Problem(
            "setting-ignored",
            f"{cache.setting('num_variants')}: got 1 with dataset.flip true, but the first variant of an image is "
            "never mirrored. Set cache.num_variants to 2 or more, or dataset.flip to false.",
        )
    ]
