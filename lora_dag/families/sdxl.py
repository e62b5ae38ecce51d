"""Stable Diffusion XL: two CLIP text encoders, pooled embeddings, micro-conditioning by size and crop, a float32 VAE.

Without a negative prompt the pipeline guides away from zeros where the base says so (``force_zeros_for_empty_prompt``,
as SDXL's own training dropped its captions), so a dropped caption is zeros in training too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core import quiet
from lora_dag.core.files import read_json
from lora_dag.families import common

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    from lora_dag.core.params import ModelParams

PIPELINE = "StableDiffusionXLPipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "scheduler": "",  # any
}
OPTIONAL = ()
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
TEXT_ENCODERS = {"text_encoder": 1, "text_encoder_2": 0}
DENOISER = "unet"
NO_GUIDANCE = 1.0

vae_scale_factor = common.vae_scale_factor
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
max_side = common.no_max_side


def left_out(model: ModelParams) -> tuple[str, ...]:
    return ()


def pixel_multiple(model: ModelParams) -> int:
    return vae_scale_factor(model) * 2 ** (len(common.config(model, "unet")["block_out_channels"]) - 1)


def drops_to_zeros(model: ModelParams) -> bool:
    """Source: StableDiffusionXLPipeline, whose default is yes."""
    return read_json(Path(model.pretrained) / "model_index.json").get("force_zeros_for_empty_prompt", True)


def view_conditioning(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """``add_time_ids``. Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2."""
    import torch

    return {"add_time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}  # [6]


def load_tokenizer(model: ModelParams, folder: str = "tokenizer") -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return common.load_tokenizer(CLIPTokenizer, model, folder)


def max_tokens(model: ModelParams) -> int:
    return load_tokenizer(model).model_max_length


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    """Both tokenizers cut alike: they differ in the padding alone."""
    return common.count_tokens(load_tokenizer(model), captions)


def load_text(model: ModelParams, device: torch.device) -> list[tuple[Any, Any]]:
    """Tokenizer and encoder, twice."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return [
        (load_tokenizer(model, f"tokenizer{n}"), common.load_frozen(cls, model, f"text_encoder{n}", device))
        for n, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection))
    ]


load_trainable_text = load_text


def text_of(pipeline: StableDiffusionXLPipeline) -> list[tuple[Any, Any]]:
    return [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]


def text_encoders(text: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {name: encoder for name, (_, encoder) in zip(TEXT_ENCODERS, text, strict=True)}


def encode_prompts(
    text: list[tuple[Any, Any]], captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` [B, L, D1 + D2]: both encoders' last but one layer; ``pooled_prompt_embeds`` [B, P]."""
    import torch

    states = [common.clip_states(*pair, captions) for pair in text]
    prompt_embeds = torch.cat([hidden for hidden, _ in states], dim=-1)
    return {"prompt_embeds": prompt_embeds.float(), "pooled_prompt_embeds": states[-1][1].float()}


def load_denoiser(model: ModelParams, device: torch.device) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return common.load_frozen(UNet2DConditionModel, model, "unet", device)


def load_scheduler(model: ModelParams) -> DDPMScheduler:
    from diffusers import DDPMScheduler

    return common.load_scheduler(DDPMScheduler, model)


def predict(
    denoiser: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    return denoiser(
        noisy_latents,
        timesteps,
        encoder_hidden_states=prompt["prompt_embeds"],
        added_cond_kwargs={"text_embeds": prompt["pooled_prompt_embeds"], "time_ids": prompt["add_time_ids"]},
    ).sample


def load_pipeline(model: ModelParams, device: torch.device) -> StableDiffusionXLPipeline:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        from diffusers import StableDiffusionXLPipeline
    vae = common.decode_in_own_dtype(load_vae(model.model_copy(update={"dtype": vae_dtype(model)}), device))
    return common.load_pipeline(StableDiffusionXLPipeline, model, device, vae=vae, add_watermarker=False)
