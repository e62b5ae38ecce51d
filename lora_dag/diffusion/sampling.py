"""Draws images with a diffusers pipeline. A prompt's noise does not depend on the prompts beside it."""

from __future__ import annotations

import inspect
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

    @property
    def batches(self) -> list[list[str]]:
        """Prompts that are drawn at a time."""
        starts = range(0, len(self.prompts), self.batch_size)
        return [self.prompts[start : start + self.batch_size] for start in starts]


EncodedPrompts = dict[tuple[str, ...], Any]
"""Prompts of a batch -> what the pipeline's ``encode_prompt`` returns for them and the negative prompt."""


def encode_prompts(pipeline: Any, samplings: list[Sampling], is_guided: bool, model: ModelParams) -> EncodedPrompts:
    """Encode the prompts of all batches as ``draw`` does, for a pipeline without text encoders."""
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    encoded = {}
    for sampling in samplings:
        for prompts in sampling.batches:
            arguments = {
                "prompt": list(prompts),  # ZImagePipeline replaces its items
                "prompt_2": None,
                "prompt_3": None,
                "negative_prompt": negative_prompts(sampling, prompts),
                "do_classifier_free_guidance": is_guided,
                "device": pipeline.device,
                "num_images_per_prompt": 1,
            }
            passed = {name: value for name, value in arguments.items() if name in accepted}
            with torch.inference_mode(), autocast(pipeline.device, model), quiet.without_warnings():
                encoded[tuple(prompts)] = pipeline.encode_prompt(**passed)
    return encoded


def use_encoded(pipeline: Any, encoded: EncodedPrompts) -> None:
    """Let a pipeline without text encoders draw from encoded prompts. They must be batches of ``encode_prompts``."""
    pipeline.encode_prompt = lambda prompt, *_, **__: encoded[tuple(prompt)]


def negative_prompts(sampling: Sampling, prompts: list[str]) -> list[str] | None:
    return [sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None


def draw(pipeline: Any, sampling: Sampling, model: ModelParams) -> list[Image.Image]:
    """Return one image per prompt, drawn with the pipeline's present weights.

    Noise is keyed by (seed, prompt, index), so that base model, snapshots and later runs start from the same noise.
    """
    images: list[Image.Image] = []
    later = (sampling.index,) if sampling.index else ()  # the noise of index 0 has no index in its key
    for prompts in sampling.batches:
        with torch.inference_mode(), autocast(pipeline.device, model), quiet.without_warnings():  # on cut prompts
            images += pipeline(
                prompts,
                negative_prompt=negative_prompts(sampling, prompts),
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.height,
                width=sampling.width,
                generator=[seeding.generator(sampling.seed, "sample", prompt, *later) for prompt in prompts],
            ).images
    return images
