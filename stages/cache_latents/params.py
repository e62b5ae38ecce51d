"""Section ``cache``: how pictures and captions go through the frozen encoders."""

from __future__ import annotations

from pydantic import Field

from lora_dag.core.params import Params


class CacheParams(Params):
    """Section ``cache``."""

    batch_size: int = Field(ge=1, le=1024)
    """Pictures or captions per forward pass. Part of every key: another size moves the last bits (2e-6 in float32)."""
    num_variants: int = Field(ge=1, le=1000)
    """Views per picture, crops and mirrors, all encoded; training draws one per step."""
    tiling: bool
    """Encode large pictures in overlapping tiles: less memory, slightly other latents."""


def flip_problems(flip: bool, num_variants: int) -> list[str]:
    """``dataset.flip`` without a second view to mirror, in one line."""
    if not flip or num_variants > 1:
        return []
    return [
        "params.yaml dataset.flip: true with cache.num_variants 1 would freeze: the one variant of each picture is "
        "not mirrored; set cache.num_variants to 2 or more, or dataset.flip to false"
    ]
