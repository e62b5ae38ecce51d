"""Pictures drawn by a diffusers pipeline under an adapter, from the same noise whatever stands beside a prompt."""

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
    """How pictures are drawn."""

    prompts: list[str]
    negative_prompt: str
    """Empty for none: what the pipeline guides away from then is its own matter."""
    num_inference_steps: int
    guidance_scale: float
    height: int
    """Pixels."""
    width: int
    seed: int
    batch_size: int
    """Pictures at a time; guidance doubles what the denoiser sees."""
    index: int = 0
    """Which of a prompt's pictures: each starts from noise of its own."""


def draw(pipeline: Any, sampling: Sampling, model: ModelParams) -> list[Image.Image]:
    """One picture per prompt with the pipeline's present weights.

    Noise is keyed by (seed, prompt, index), so that base, snapshots and later runs start from the same noise.
    """
    pictures: list[Image.Image] = []
    later = (sampling.index,) if sampling.index else ()  # the first one's noise goes by the prompt alone
    for start in range(0, len(sampling.prompts), sampling.batch_size):
        prompts = sampling.prompts[start : start + sampling.batch_size]
        with torch.inference_mode(), autocast(pipeline.device, model), quiet.no_warnings():  # of prompts that are cut
            pictures += pipeline(
                prompts,
                negative_prompt=[sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.height,
                width=sampling.width,
                generator=[seeding.generator(sampling.seed, "sample", prompt, *later) for prompt in prompts],
            ).images
    return pictures
