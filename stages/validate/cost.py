"""What a training image costs in arithmetic, counted and not measured: the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.latent_cache import LatentCache
    from stages.validate.heldout_loss import EvalSet


def tflop_per_image(eval_set: EvalSet, adapter: Adapter, cache: LatentCache) -> float:
    """10^12 floating-point operations of one image in training: the adapted denoiser forward and backward, batch 1.

    Matrix products, convolutions and attention, a multiplication and an addition counted as two, on the meta device:
    nothing is computed. The frozen weights pass gradients on and get none. Without dropout, text encoders, and the
    second forward of gradient checkpointing.

    Source: torch.utils.flop_counter.
    """
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_dag.adapters import lora
    from lora_dag.core import quiet
    from lora_dag.families import common

    cls = getattr(diffusers, eval_set.family.COMPONENTS[eval_set.family.DENOISER])
    picture = eval_set.rows[0].picture
    prompt = {name: tensor[None] for name, tensor in cache.prompt(picture.caption, picture.view).items()}
    channels = cache.latents(picture.view)[0].shape[0]
    with torch.device("meta"), quiet.no_warnings():
        denoiser = cls.from_config(common.config(eval_set.model, eval_set.family.DENOISER)).requires_grad_(False)
        lora.inject(denoiser, adapter.lora_config)
        denoiser.eval()  # in train mode LoKr draws a number and reads it, which meta tensors cannot give
        latents = torch.zeros(1, channels, *eval_set.picture_size)
        timesteps = torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            eval_set.family.predict(denoiser, latents, timesteps, on_meta(prompt)).mean().backward()
    return counter.get_total_flops() / 1e12


def on_meta(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without values, but for masks: they say how many tokens there are."""
    return {name: tensor if name.endswith("mask") else tensor.to("meta") for name, tensor in prompt.items()}
