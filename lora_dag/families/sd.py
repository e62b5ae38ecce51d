"""Stable Diffusion 1.x and 2.x, and the embedded base: UNet2DConditionModel, AutoencoderKL, one CLIP text encoder.

v-prediction and zero terminal SNR are data of the scheduler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_dag.core import quiet
from lora_dag.families import common

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from lora_dag.core.params import Dtype, ModelParams

PIPELINE = "StableDiffusionPipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "scheduler": "",  # any
}
OPTIONAL = ()
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder")
TEXT_ENCODERS = {"text_encoder": 0}
DENOISER = "unet"
NO_GUIDANCE = 1.0

vae_scale_factor = common.vae_scale_factor
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
drops_to_zeros = common.drops_to_empty
max_side = common.no_max_side


def left_out(model: ModelParams) -> tuple[str, ...]:
    return ("safety_checker",)


def pixel_multiple(model: ModelParams) -> int:
    return vae_scale_factor(model) * 2 ** (len(common.config(model, "unet")["block_out_channels"]) - 1)


def vae_dtype(model: ModelParams) -> Dtype:
    """float32 for a VAE whose config says ``force_upcast`` and that float16 would overflow.

    Source: diffusers' StableDiffusionXLPipeline, ``needs_upcasting``.
    """
    upcast = common.config(model, "vae").get("force_upcast")
    return "float32" if model.dtype == "float16" and upcast else model.dtype


def load_tokenizer(model: ModelParams) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return common.load_tokenizer(CLIPTokenizer, model, "tokenizer")


def max_tokens(model: ModelParams) -> int:
    return load_tokenizer(model).model_max_length


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    return common.count_tokens(load_tokenizer(model), captions)


def load_text(model: ModelParams, device: torch.device) -> tuple[CLIPTokenizer, CLIPTextModel]:
    from transformers import CLIPTextModel

    return load_tokenizer(model), common.load_frozen(CLIPTextModel, model, "text_encoder", device)


load_trainable_text = load_text


def text_of(pipeline: StableDiffusionPipeline) -> tuple[CLIPTokenizer, CLIPTextModel]:
    return pipeline.tokenizer, pipeline.text_encoder


def text_encoders(text: tuple[CLIPTokenizer, CLIPTextModel]) -> dict[str, CLIPTextModel]:
    return {"text_encoder": text[1]}


def encode_prompts(
    text: tuple[CLIPTokenizer, CLIPTextModel], captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    tokenizer, encoder = text
    ids = common.input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    return {"prompt_embeds": encoder(ids).last_hidden_state.float()}  # [B, L, D]


def load_denoiser(model: ModelParams, device: torch.device) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    unet = common.load_frozen(UNet2DConditionModel, model, "unet", device)
    return unet if model.dtype == "float32" else _choose_attention(unet)  # training in float32, SDPA takes 4 % less


def load_scheduler(model: ModelParams) -> DDPMScheduler:
    from diffusers import DDPMScheduler

    return common.load_scheduler(DDPMScheduler, model)


def predict(
    denoiser: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    return denoiser(noisy_latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"]).sample


def load_pipeline(model: ModelParams, device: torch.device) -> StableDiffusionPipeline:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        from diffusers import StableDiffusionPipeline
    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = common.load_pipeline(StableDiffusionPipeline, model, device, **left_out)
    _choose_attention(pipeline.unet)
    return pipeline


def _choose_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Small latents on a CPU: the plain processor takes 237 ms where SDPA takes 327 (16 latents of 16x16, bf16)."""
    from diffusers.models.attention_processor import AttnProcessor

    if unet.device.type == "cpu" and unet.config.sample_size <= 32:
        unet.set_attn_processor(AttnProcessor())
    return unet
