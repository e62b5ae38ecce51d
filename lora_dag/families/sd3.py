"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, flow matching, CLIP-L, CLIP-G and optionally T5.

A base model without T5 has ``"text_encoder_3": [null, null]`` in its model_index.json, also for ``tokenizer_3``. T5's
part of the sequence is zeros then, as in diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.families import common
from lora_dag.families.common import SWAPPED
from lora_dag.families.protocol import SingleFile

if TYPE_CHECKING:
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from lora_dag.core.params import ModelParams

PIPELINE = "StableDiffusion3Pipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
    "text_encoder_3": "T5EncoderModel",
    "tokenizer_3": "T5Tokenizer",
    "transformer": "SD3Transformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
OPTIONAL = ("text_encoder_3", "tokenizer_3")
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
TEXT_ENCODERS = {"text_encoder": 0, "text_encoder_2": 0}
DENOISER = "transformer"
NO_GUIDANCE = 1.0
MAX_T5_TOKENS = 256
"""Source: StableDiffusion3Pipeline, ``max_sequence_length``."""

HUB_TAG = "sd3"
MODELSPEC = "stable-diffusion-3-medium"
COMFYUI = {name: f"{name}." for name in ("transformer", *TEXT_ENCODERS)}
ORIGINAL_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.{i}.x_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1.linear",
    "joint_blocks.{i}.x_block.attn.qkv": "transformer_blocks.{i}.attn. to_q to_k to_v",
    "joint_blocks.{i}.x_block.attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "joint_blocks.{i}.x_block.attn2.qkv": "transformer_blocks.{i}.attn2. to_q to_k to_v",
    "joint_blocks.{i}.x_block.attn2.proj": "transformer_blocks.{i}.attn2.to_out.0",
    "joint_blocks.{i}.x_block.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
    "joint_blocks.{i}.x_block.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
    "joint_blocks.{last}.context_block.adaLN_modulation.1": SWAPPED + "transformer_blocks.{last}.norm1_context.linear",
    "joint_blocks.{i}.context_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1_context.linear",
    "joint_blocks.{i}.context_block.attn.qkv": "transformer_blocks.{i}.attn. add_q_proj add_k_proj add_v_proj",
    "joint_blocks.{i}.context_block.attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "joint_blocks.{i}.context_block.mlp.fc1": "transformer_blocks.{i}.ff_context.net.0.proj",
    "joint_blocks.{i}.context_block.mlp.fc2": "transformer_blocks.{i}.ff_context.net.2",
    "final_layer.adaLN_modulation.1": SWAPPED + "norm_out.linear",
    "final_layer.linear": "proj_out",
}
PRESET_LAYERS: dict[str, str] = {}
SINGLE_FILE = SingleFile(
    marker_tensors=("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    component_prefixes={
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    configs_repo="stabilityai/stable-diffusion-3-medium-diffusers",
)

vae_scale_factor = common.vae_scale_factor
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
load_tokenizer = common.load_tokenizer
drops_to_zeros = common.drops_to_empty
load_denoiser = common.load_denoiser
load_scheduler = common.load_scheduler
load_pipeline = common.load_pipeline


def left_out(model: ModelParams) -> tuple[str, ...]:
    return OPTIONAL if common.declared_null(model, OPTIONAL) else ()


def pixel_multiple(model: ModelParams) -> int:
    return vae_scale_factor(model) * common.config(model, "transformer")["patch_size"]


def max_side(model: ModelParams) -> int | None:
    """Return the longest side in pixels by the table of positions, which is cropped for every size."""
    positions = common.config(model, "transformer")["pos_embed_max_size"]
    return positions and positions * pixel_multiple(model)


def max_tokens(model: ModelParams) -> int:
    return common.max_tokens(model) if left_out(model) else MAX_T5_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    """Return the token counts of the tokenizer with the highest limit: T5's, or CLIP's without T5."""
    return common.count_tokens(model, captions, "tokenizer" if left_out(model) else "tokenizer_3")


@dataclass(frozen=True)
class Text:
    """Tokenizers and text encoders."""

    encoders: common.Text
    width: int
    """Features of a token in the transformer's input."""


def load_text(model: ModelParams, device: torch.device) -> Text:
    return Text(common.load_text(model, device), common.config(model, "transformer")["joint_attention_dim"])


def load_trainable_text(model: ModelParams, device: torch.device) -> Text:
    """Load only the CLIP encoders."""
    return Text(common.load_trainable_text(model, device), common.config(model, "transformer")["joint_attention_dim"])


def text_of(pipeline: StableDiffusion3Pipeline) -> Text:
    return Text(common.text_of(pipeline), pipeline.transformer.config.joint_attention_dim)


def text_encoders(text: Text) -> dict[str, Any]:
    return {name: text.encoders[name][1] for name in TEXT_ENCODERS}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` [B, L + 256, D] and ``pooled_prompt_embeds`` [B, P1 + P2].

    In ``prompt_embeds``, the features of both CLIP encoders are concatenated, and T5's tokens follow.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 4 and figure 2.
    """
    import torch

    states = [common.clip_states(*text.encoders[name], captions) for name in TEXT_ENCODERS]
    clip = torch.cat([hidden for hidden, _ in states], dim=-1).float()
    clip = torch.nn.functional.pad(clip, (0, text.width - clip.shape[-1]))  # [B, L, D]
    t5 = clip.new_zeros(len(captions), MAX_T5_TOKENS, text.width)
    if cached is not None:
        t5 = cached["prompt_embeds"][:, clip.shape[1] :]
    elif "text_encoder_3" in text.encoders:
        t5 = common.t5_states(*text.encoders["text_encoder_3"], captions, MAX_T5_TOKENS).float()  # [B, 256, D]
    pooled = torch.cat([pooled for _, pooled in states], dim=-1)
    return {"prompt_embeds": torch.cat([clip, t5], dim=1), "pooled_prompt_embeds": pooled.float()}


def predict(
    denoiser: SD3Transformer2DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    return denoiser(
        hidden_states=noisy_latents,
        timestep=timesteps,
        encoder_hidden_states=prompt["prompt_embeds"],
        pooled_projections=prompt["pooled_prompt_embeds"],
    ).sample
