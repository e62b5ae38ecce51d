"""Stable Diffusion 1.x and 2.x, and the embedded base: UNet2DConditionModel, AutoencoderKL, one CLIP text encoder.

The scheduler's config specifies v-prediction and zero terminal SNR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.families import common, unet
from lora_dag.families.protocol import SingleFile

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from lora_dag.core.params import Dtype, ModelParams
    from lora_dag.families.common import Text

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

HUB_TAG = "stable-diffusion"
MODELSPEC = "stable-diffusion-v1"
COMFYUI = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
ORIGINAL_LAYERS = unet.ORIGINAL_LAYERS
PRESET_LAYERS = unet.PRESET_LAYERS
SINGLE_FILE = SingleFile(
    marker_tensors=("model.diffusion_model.input_blocks.0.0.weight",),
    component_prefixes={"vae": ("first_stage_model.",), "text_encoder": ("cond_stage_model.",)},
    configs_repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
)

vae_scale_factor = common.vae_scale_factor
pixel_multiple = unet.pixel_multiple
max_side = common.no_max_side
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
load_tokenizer = common.load_tokenizer
max_tokens = common.max_tokens
count_tokens = common.count_tokens
drops_to_zeros = common.drops_to_empty
load_text = common.load_text
load_trainable_text = common.load_trainable_text
text_of = common.text_of
load_scheduler = common.load_scheduler


def left_out(model: ModelParams) -> tuple[str, ...]:
    return ("safety_checker",)


def vae_dtype(model: ModelParams) -> Dtype:
    """Return float32 for a VAE with ``force_upcast`` that would overflow in float16, otherwise ``model.dtype``.

    Source: diffusers' StableDiffusionXLPipeline, ``needs_upcasting``.
    """
    upcast = common.config(model, "vae").get("force_upcast")
    return "float32" if model.dtype == "float16" and upcast else model.dtype


def text_encoders(text: Text) -> dict[str, CLIPTextModel]:
    return {name: text[name][1] for name in TEXT_ENCODERS}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` [B, L, D]: the last layer's states."""
    tokenizer, encoder = text["text_encoder"]
    ids = common.input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    return {"prompt_embeds": encoder(ids).last_hidden_state.float()}  # [B, L, D]


def load_denoiser(model: ModelParams, device: torch.device) -> UNet2DConditionModel:
    denoiser = common.load_denoiser(model, device)
    if model.dtype == "float32":
        return denoiser  # SDPA takes 4 % less
    return _choose_attention(denoiser, device)


def predict(
    denoiser: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    return denoiser(noisy_latents, timesteps, encoder_hidden_states=prompt["prompt_embeds"]).sample


def load_pipeline(model: ModelParams, device: torch.device, **components: Any) -> StableDiffusionPipeline:
    passed = {"feature_extractor": None, "requires_safety_checker": False} | components
    pipeline = common.load_pipeline(model, device, **passed)
    if pipeline.unet is not None:
        _choose_attention(pipeline.unet, device)
    return pipeline


def _choose_attention(denoiser: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """Set the plain processor for small latents on a CPU: 237 ms, SDPA 327 ms (16 latents of 16x16, bf16)."""
    from diffusers.models.attention_processor import AttnProcessor

    if device.type == "cpu" and denoiser.config.sample_size <= 32:
        denoiser.set_attn_processor(AttnProcessor())
    return denoiser
