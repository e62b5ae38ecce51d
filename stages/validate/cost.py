"""Arithmetic of one training image, counted and not measured, so that it is the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.latent_cache import LatentCache
    from stages.validate.heldout_loss import EvalSet


def tflop_per_image(eval_set: EvalSet, adapter: Adapter, cache: LatentCache) -> float:
    """Return 10^12 floating-point operations of one training image: forward and backward of the adapted denoiser.

    Matrix products, convolutions and attention count, a multiplication and an addition as two operations. They run on
    the meta device, which computes nothing. Frozen weights pass gradients on and get none. Dropout, text encoders and
    the second forward of gradient checkpointing do not count.

    Source: torch.utils.flop_counter.
    """
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_dag.adapters import lora
    from lora_dag.core import quiet
    from lora_dag.families import common

    cls = getattr(diffusers, eval_set.family.COMPONENTS[eval_set.family.DENOISER])
    image = eval_set.rows[0].image
    prompt = {name: tensor[None] for name, tensor in cache.prompt(image.caption, image.view).items()}
    channels = cache.latents(image.view)[0].shape[0]
    with torch.device("meta"), quiet.without_warnings():
        denoiser = cls.from_config(common.config(eval_set.model, eval_set.family.DENOISER)).requires_grad_(False)
        lora.inject(denoiser, adapter.lora_config)
        denoiser.eval()  # in train mode LoKr draws a number and reads it, which meta tensors cannot give
        latents = torch.zeros(1, channels, *eval_set.image_size)
        timesteps = torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            eval_set.family.predict(denoiser, latents, timesteps, prompt_on_meta(prompt)).mean().backward()
    return counter.get_total_flops() / 1e12


def prompt_on_meta(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the prompt without values, except for masks, which give the number of tokens."""
    return {name: tensor if name.endswith("mask") else tensor.to("meta") for name, tensor in prompt.items()}
