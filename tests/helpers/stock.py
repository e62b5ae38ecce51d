"""What a stock pipeline says and does, without this project's families: the reference that these are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stock:
    """One pipeline class."""

    cls: str
    encode: Callable[[Any, list[str]], Tensors]
    """(pipeline, captions) -> what its own ``encode_prompt`` returns without guidance, named as here."""
    call: Callable[[Any, torch.Tensor, torch.Tensor, Tensors], torch.Tensor]
    """(pipeline, noisy latents, timesteps as the model counts them, conditioning) -> the denoiser's output."""
    unpack: Callable[[Any, Any], torch.Tensor] = lambda pipeline, latents: latents
    """(pipeline, what the denoiser takes and returns for a square picture) -> [B, C, h, w]."""
    sign: int = 1
    """What the pipeline multiplies the denoiser's output by."""
    options: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments of a call in which the denoiser sees the prompts alone, and sees what training sees."""
    timesteps: Callable[[torch.Tensor], torch.Tensor] = lambda given: given
    """What the denoiser is given -> timesteps as the model counts them."""
