"""FLUX.1 (dev and schnell): FluxTransformer2DModel on packed latents, flow matching, T5, and CLIP's pooled output.

``dev`` is distilled for guidance: the scale is an input of the transformer, and negative prompts are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.families import common
from lora_dag.families.common import SWAPPED
from lora_dag.families.protocol import SingleFile

if TYPE_CHECKING:
    import torch
    from diffusers import FluxTransformer2DModel

    from lora_dag.core.params import ModelParams
    from lora_dag.families.common import Text

PIPELINE = "FluxPipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "text_encoder_2": "T5EncoderModel",
    "tokenizer_2": "T5Tokenizer",
    "transformer": "FluxTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
OPTIONAL = ()
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
TEXT_ENCODERS = {"text_encoder": 0}
DENOISER = "transformer"
NO_GUIDANCE = None
MAX_T5_TOKENS = 512
"""Source: FluxPipeline, ``max_sequence_length``."""
TRAINING_GUIDANCE = 1.0
"""Guidance scale in training. The target is the velocity of the data, which is the prediction at a scale of 1.

Source: diffusers' examples/dreambooth/README_flux.md, ``--guidance_scale=1``.
"""

HUB_TAG = "flux"
MODELSPEC = "flux-1-dev"
COMFYUI = {name: f"{name}." for name in ("transformer", *TEXT_ENCODERS)}
ORIGINAL_LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.{i}.img_mod.lin": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.img_attn.qkv": "transformer_blocks.{i}.attn. to_q to_k to_v",
    "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.net.2",
    "double_blocks.{i}.txt_mod.lin": "transformer_blocks.{i}.norm1_context.linear",
    "double_blocks.{i}.txt_attn.qkv": "transformer_blocks.{i}.attn. add_q_proj add_k_proj add_v_proj",
    "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.net.2",
    "single_blocks.{i}.modulation.lin": "single_transformer_blocks.{i}.norm.linear",
    "single_blocks.{i}.linear1": "single_transformer_blocks.{i}. attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.proj_out",
    "final_layer.adaLN_modulation.1": SWAPPED + "norm_out.linear",
    "final_layer.linear": "proj_out",
}
PRESET_LAYERS = {"feed_forward": "proj_mlp"}
SINGLE_FILE = SingleFile(
    marker_tensors=("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",),
    component_prefixes={
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
    configs_repo="black-forest-labs/FLUX.1-dev",
)

left_out = common.nothing_left_out
vae_scale_factor = common.vae_scale_factor
pixel_multiple = common.pixels_of_2x2_latents
max_side = common.no_max_side
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
load_tokenizer = common.load_tokenizer
drops_to_zeros = common.drops_to_empty
load_text = common.load_text
load_trainable_text = common.load_trainable_text
text_of = common.text_of
load_denoiser = common.load_denoiser
load_scheduler = common.load_scheduler
load_pipeline = common.load_pipeline


def max_tokens(model: ModelParams) -> int:
    return MAX_T5_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    """Return T5's token counts: truncation by CLIP affects only its pooled output."""
    return common.count_tokens(model, captions, "tokenizer_2")


def text_encoders(text: Text) -> dict[str, Any]:
    return {name: text[name][1] for name in TEXT_ENCODERS}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` [B, 512, D] of T5 and ``pooled_prompt_embeds`` [B, P] of CLIP."""
    tokenizer, encoder = text["text_encoder"]
    ids = common.input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    pooled = encoder(ids).pooler_output.float()
    if cached is not None:
        return {"pooled_prompt_embeds": pooled}
    prompt_embeds = common.t5_states(*text["text_encoder_2"], captions, MAX_T5_TOKENS).float()
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def predict(
    denoiser: FluxTransformer2DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    height, width = noisy_latents.shape[-2:]
    guidance = noisy_latents.new_full(timesteps.shape, TRAINING_GUIDANCE) if denoiser.config.guidance_embeds else None
    model_pred = denoiser(
        hidden_states=pack(noisy_latents),
        timestep=timesteps / 1000,
        guidance=guidance,
        pooled_projections=prompt["pooled_prompt_embeds"],
        encoder_hidden_states=prompt["prompt_embeds"],
        txt_ids=noisy_latents.new_zeros(prompt["prompt_embeds"].shape[1], 3),
        img_ids=image_ids(height // 2, width // 2, noisy_latents.device),
    ).sample
    return unpack(model_pred, height, width)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return patches of 2x2, with the channel outermost in each: [B, C, h, w] -> [B, h/2 * w/2, 4 C]."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return latents of patches, the inverse of ``pack``: [B, h/2 * w/2, 4 C] -> [B, C, h, w]."""
    grid = patches.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # [B, h/2, w/2, C, 2, 2]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return each patch's position for the rotary embedding: 0, row, column; float32 [rows * columns, 3]."""
    import torch

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float().to(device)
