"""Stable Diffusion XL: two CLIP text encoders, pooled embeddings, micro-conditioning by size and crop, a float32 VAE.

Without a negative prompt, the pipeline uses zeros if the base model has ``force_zeros_for_empty_prompt``, as SDXL's own
training did for dropped captions. So a dropped caption is zeros in training too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.files import read_json
from lora_dag.families import common, unet
from lora_dag.families.protocol import SingleFile

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    from lora_dag.core.params import ModelParams
    from lora_dag.families.common import Text

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

HUB_TAG = "stable-diffusion-xl"
MODELSPEC = "stable-diffusion-xl-v1-base"
COMFYUI = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ORIGINAL_LAYERS = unet.ORIGINAL_LAYERS
PRESET_LAYERS = unet.PRESET_LAYERS
SINGLE_FILE = SingleFile(
    marker_tensors=("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"),
    component_prefixes={
        "vae": ("first_stage_model.",),
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    configs_repo="stabilityai/stable-diffusion-xl-base-1.0",
)

left_out = common.nothing_left_out
vae_scale_factor = common.vae_scale_factor
pixel_multiple = unet.pixel_multiple
max_side = common.no_max_side
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
load_tokenizer = common.load_tokenizer
max_tokens = common.max_tokens
count_tokens = common.count_tokens  # both tokenizers truncate equally and differ only in padding
load_text = common.load_text
load_trainable_text = common.load_trainable_text
text_of = common.text_of
load_denoiser = common.load_denoiser
load_scheduler = common.load_scheduler


def drops_to_zeros(model: ModelParams) -> bool:
    """Return ``force_zeros_for_empty_prompt``. Source: StableDiffusionXLPipeline, whose default is True."""
    return read_json(Path(model.pretrained) / "model_index.json").get("force_zeros_for_empty_prompt", True)


def view_conditioning(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Return ``add_time_ids``: six numbers, float32 [6]. Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2."""
    import torch

    return {"add_time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}  # [6]


def text_encoders(text: Text) -> dict[str, Any]:
    return {name: text[name][1] for name in TEXT_ENCODERS}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` [B, L, D1 + D2] of both second-to-last layers and ``pooled_prompt_embeds`` [B, P]."""
    import torch

    states = [common.clip_states(*text[name], captions) for name in TEXT_ENCODERS]
    prompt_embeds = torch.cat([hidden for hidden, _ in states], dim=-1)
    return {"prompt_embeds": prompt_embeds.float(), "pooled_prompt_embeds": states[-1][1].float()}


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


def load_pipeline(model: ModelParams, device: torch.device, **components: Any) -> StableDiffusionXLPipeline:
    if "vae" not in components:
        vae = load_vae(model.model_copy(update={"dtype": vae_dtype(model)}), device)
        components["vae"] = common.decode_in_own_dtype(vae)
    return common.load_pipeline(model, device, add_watermarker=False, **components)
