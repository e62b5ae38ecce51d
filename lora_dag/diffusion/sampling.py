"""Draws images with a diffusers pipeline. A prompt's noise does not depend on the prompts beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.core import quiet, seeding
from lora_dag.core.device import autocast

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.core.params import ModelParams


@dataclass(frozen=True)
class Sampling:
    """Settings of a drawing."""

    prompts: list[str]
    negative_prompt: str
    """Empty for none; the pipeline's default applies."""
    num_inference_steps: int
    guidance_scale: float
    height: int
    """Pixels."""
    width: int
    seed: int
    batch_size: int
    """Images at a time; guidance doubles the denoiser's batch."""
    index: int = 0
    """Number of the image of a prompt; each starts from other noise."""


def draw(pipeline: Any, sampling: Sampling, model: ModelParams) -> list[Image.Image]:
    """Return one image per prompt, drawn with the pipeline's present weights.

    Noise is keyed by (seed, prompt, index), so that base model, snapshots and later runs start from the same noise.
    """
    images: list[Image.Image] = []
    later = (sampling.index,) if sampling.index else ()  # the noise of index 0 has no index in its key
    for start in range(0, len(sampling.prompts), sampling.batch_size):
        prompts = sampling.prompts[start : start + sampling.batch_size]
        with torch.inference_mode(), autocast(pipeline.device, model), quiet.without_warnings():  # on cut prompts
            images += pipeline(
                prompts,
                negative_prompt=[sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.height,
                width=sampling.width,
                generator=[seeding.generator(sampling.seed, "sample", prompt, *later) for prompt in prompts],
            ).images
    return images
