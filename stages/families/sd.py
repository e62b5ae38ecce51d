"""Stable Diffusion 1.x and 2.x, and the embedded base: UNet2DConditionModel, AutoencoderKL, one CLIP text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import quiet
from stages.core.files import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer

    from stages.core.params import Dtype, ModelParams

PIPELINE = "StableDiffusionPipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "scheduler": "",  # any
}
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder")
DENOISER = "unet"


def pixel_multiple(model: ModelParams) -> int:
    unet = read_json(Path(model.pretrained) / "unet" / "config.json")
    return vae_scale_factor(model) * 2 ** (len(unet["block_out_channels"]) - 1)


def vae_scale_factor(model: ModelParams) -> int:
    vae = read_json(Path(model.pretrained) / "vae" / "config.json")
    return 2 ** (len(vae["block_out_channels"]) - 1)


def vae_dtype(model: ModelParams) -> Dtype:
    """float32 for a VAE whose config says ``force_upcast`` and that float16 would overflow.

    Source: diffusers' StableDiffusionXLPipeline, ``needs_upcasting``.
    """
    vae = read_json(Path(model.pretrained) / "vae" / "config.json")
    return "float32" if model.dtype == "float16" and vae.get("force_upcast") else model.dtype


def load_vae(model: ModelParams, device: torch.device, tiling: bool = False) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    vae = _freeze(AutoencoderKL.from_pretrained(model.pretrained, **_source(model, "vae")), device)
    if tiling:
        vae.enable_tiling()
    return vae


def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    with torch.inference_mode():
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def load_tokenizer(model: ModelParams) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(model.pretrained, subfolder="tokenizer", local_files_only=True)


def max_tokens(model: ModelParams) -> int:
    return load_tokenizer(model).model_max_length


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    return [len(ids) for ids in load_tokenizer(model)(captions, truncation=False).input_ids]


def load_text(model: ModelParams, device: torch.device) -> tuple[CLIPTokenizer, CLIPTextModel]:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(model.pretrained, **_source(model, "text_encoder"))
    return load_tokenizer(model), _freeze(encoder, device)


def encode_prompts(text: tuple[CLIPTokenizer, CLIPTextModel], captions: list[str]) -> dict[str, torch.Tensor]:
    import torch

    tokenizer, encoder = text
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = encoder(tokens.input_ids.to(encoder.device)).last_hidden_state  # [B, L, D]
    return {"prompt_embeds": hidden.float()}


def load_denoiser(model: ModelParams, device: torch.device) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    unet = _freeze(UNet2DConditionModel.from_pretrained(model.pretrained, **_source(model, "unet")), device)
    return _choose_attention(unet)


def load_scheduler(model: ModelParams) -> SchedulerMixin:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(model.pretrained, subfolder="scheduler", local_files_only=True)


def predict(
    denoiser: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    return denoiser(noisy_latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"]).sample


def load_pipeline(model: ModelParams, device: torch.device) -> StableDiffusionPipeline:
    import torch

    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        from diffusers import StableDiffusionPipeline
    quiet.disable_progress_bars()
    pipeline = StableDiffusionPipeline.from_pretrained(
        model.pretrained,
        variant=model.variant,
        dtype=getattr(torch, model.dtype),
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    _choose_attention(pipeline.unet)
    return pipeline


def _source(model: ModelParams, subfolder: str) -> dict[str, Any]:
    import torch

    quiet.disable_progress_bars()
    return {
        "subfolder": subfolder,
        "variant": model.variant,
        "dtype": getattr(torch, model.dtype),
        "use_safetensors": True,
        "local_files_only": True,
    }


def _choose_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Small latents on a CPU: the plain processor takes 237 ms where SDPA takes 327 (16 latents of 16x16, bf16)."""
    from diffusers.models.attention_processor import AttnProcessor

    if unet.device.type == "cpu" and unet.config.sample_size <= 32:
        unet.set_attn_processor(AttnProcessor())
    return unet


def _freeze(module: torch.nn.Module, device: torch.device) -> Any:
    """In eval mode, without gradients."""
    return module.eval().requires_grad_(False).to(device)
