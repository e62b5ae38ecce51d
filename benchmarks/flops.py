"""Count floating-point operations per image on the meta device, without computing anything.

Matrix products, convolutions and attention are counted; a multiplication and an addition are two operations. The
backward pass of the frozen denoiser computes gradients of its inputs, and none of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bases import Base

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Flops:
    encode: int
    """One image to its latents."""
    forward: int
    """The denoiser with its adapter, on one image's latents,"""
    step: int
    """and with its backward."""


def count(base: Base, rank: int) -> Flops:
    with torch.device("meta"):
        modules = base.modules()
        unet, side = modules["unet"].requires_grad_(False), base.resolution // base.vae_scale_factor
        unet.add_adapter(LoraConfig(r=rank, target_modules=TARGETS))
        inputs = torch.zeros(1, 4, side, side), torch.zeros(1, dtype=torch.long)
        states = torch.zeros(1, modules["text_encoder"].config.max_position_embeddings, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as encode:
            modules["vae"].encode(torch.zeros(1, 3, base.resolution, base.resolution))
        with FlopCounterMode(display=False) as step:
            output = unet(*inputs, states, **conditioning(base, modules)).sample
            forward = step.get_total_flops()
            output.mean().backward()
    return Flops(encode.get_total_flops(), forward, step.get_total_flops())


def conditioning(base: Base, modules: dict[str, Any]) -> dict[str, Any]:
    if base.family != "sdxl":
        return {}
    pooled = torch.zeros(1, modules["text_encoder_2"].config.projection_dim)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}}
