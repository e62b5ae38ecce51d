"""What the stock pipelines say and do, asked without this project's families: the reference that these are held to."""

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
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a call in which the denoiser sees the prompts alone, and sees what training sees."""
    timesteps: Callable[[torch.Tensor], torch.Tensor] = lambda told: told
    """What the denoiser is told -> timesteps as the model counts them."""


def encode_sd(pipe: Any, captions: list[str]) -> Tensors:
    return {"prompt_embeds": pipe.encode_prompt(captions, "cpu", 1, False)[0]}


def call_sd(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    return pipe.unet(noisy, timesteps, encoder_hidden_states=given["prompt_embeds"], return_dict=False)[0]


def encode_sdxl(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call_sdxl(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["add_time_ids"]}
    return pipe.unet(
        noisy,
        timesteps,
        encoder_hidden_states=given["prompt_embeds"],
        timestep_cond=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def encode_sd3(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call_sd3(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    return pipe.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"],
        joint_attention_kwargs=None,
        return_dict=False,
    )[0]


def encode_flux(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, pooled, _ = pipe.encode_prompt(captions, None)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call_flux(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    count, channels, height, width = noisy.shape
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.full([count], 1.0) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=given["pooled_prompt_embeds"],
        encoder_hidden_states=given["prompt_embeds"],
        txt_ids=torch.zeros(given["prompt_embeds"].shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(packed, height * factor, width * factor, factor)


def unpack_flux(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    side = int(latents.shape[1] ** 0.5) * 2 * pipe.vae_scale_factor
    return pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)


def encode_z_image(pipe: Any, captions: list[str]) -> Tensors:
    """The list that the pipeline returns, one [its length, D] each, laid into zeros of the longest it reads."""
    embeds, _ = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)  # it edits the list
    found = {"prompt_embeds": torch.zeros(len(embeds), 512, embeds[0].shape[1])}
    found["prompt_embeds_mask"] = torch.zeros(len(embeds), 512)
    for index, own in enumerate(embeds):
        found["prompt_embeds"][index, : len(own)] = own
        found["prompt_embeds_mask"][index, : len(own)] = 1
    return found


def call_z_image(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    lengths = given["prompt_embeds_mask"].sum(1).int()
    embeds = [padded[:length] for padded, length in zip(given["prompt_embeds"], lengths, strict=True)]
    told = (1000 - timesteps) / 1000
    output = pipe.transformer(list(noisy.unsqueeze(2).unbind(dim=0)), told, embeds, return_dict=False)[0]
    return -unpack_z_image(pipe, output)


def unpack_z_image(pipe: Any, latents: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([frames.squeeze(1) for frames in latents])


STOCK = {
    "flux": Stock(
        "FluxPipeline",
        encode_flux,
        call_flux,
        unpack_flux,
        options={"guidance_scale": 1.0},
        timesteps=lambda told: told * 1000,
    ),
    "sd": Stock("StableDiffusionPipeline", encode_sd, call_sd, options={"guidance_scale": 1.0}),
    "sd3": Stock("StableDiffusion3Pipeline", encode_sd3, call_sd3, options={"guidance_scale": 1.0}),
    "sdxl": Stock("StableDiffusionXLPipeline", encode_sdxl, call_sdxl, options={"guidance_scale": 1.0}),
    "z_image": Stock(
        "ZImagePipeline",
        encode_z_image,
        call_z_image,
        unpack_z_image,
        sign=-1,
        options={"guidance_scale": 0.0},
        timesteps=lambda told: 1000 - told * 1000,
    ),
}
