"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, flow matching, CLIP-L and CLIP-G and, where it is there, T5.

A base without T5 says so in its model_index.json (``"text_encoder_3": [null, null]``, ``tokenizer_3`` likewise); its
place in the sequence is zeros then, as in diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_dag.bases import layout
from lora_dag.core import quiet
from lora_dag.families import common

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

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

vae_scale_factor = common.vae_scale_factor
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
drops_to_zeros = common.drops_to_empty


def left_out(model: ModelParams) -> tuple[str, ...]:
    return OPTIONAL if layout.absent(model, OPTIONAL) else ()


def pixel_multiple(model: ModelParams) -> int:
    return vae_scale_factor(model) * common.config(model, "transformer")["patch_size"]


def max_side(model: ModelParams) -> int | None:
    """By the table of positions, which is cropped for every size."""
    positions = common.config(model, "transformer")["pos_embed_max_size"]
    return positions and positions * pixel_multiple(model)


def load_tokenizer(model: ModelParams) -> Any:
    """The one that reads most of a caption: T5's, or CLIP's without it."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if left_out(model):
        return common.load_tokenizer(CLIPTokenizer, model, "tokenizer")
    return common.load_tokenizer(T5Tokenizer, model, "tokenizer_3")


def max_tokens(model: ModelParams) -> int:
    return load_tokenizer(model).model_max_length if left_out(model) else MAX_T5_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    return common.count_tokens(load_tokenizer(model), captions)


@dataclass(frozen=True)
class Text:
    clip: list[tuple[Any, Any]]
    """Tokenizer and encoder, twice."""
    t5: tuple[Any, Any] | None
    width: int
    """Features of a token, as the transformer takes them."""


def load_text(model: ModelParams, device: torch.device) -> Text:
    from transformers import T5EncoderModel

    text = load_trainable_text(model, device)
    if left_out(model):
        return text
    t5 = load_tokenizer(model), common.load_frozen(T5EncoderModel, model, "text_encoder_3", device)
    return replace(text, t5=t5)


def load_trainable_text(model: ModelParams, device: torch.device) -> Text:
    """CLIP's alone."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    clip = [
        (
            common.load_tokenizer(CLIPTokenizer, model, f"tokenizer{n}"),
            common.load_frozen(CLIPTextModelWithProjection, model, f"text_encoder{n}", device),
        )
        for n in ("", "_2")
    ]
    return Text(clip, None, common.config(model, "transformer")["joint_attention_dim"])


def text_of(pipeline: StableDiffusion3Pipeline) -> Text:
    clip = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    t5 = (pipeline.tokenizer_3, pipeline.text_encoder_3) if pipeline.text_encoder_3 is not None else None
    return Text(clip, t5, pipeline.transformer.config.joint_attention_dim)


def text_encoders(text: Text) -> dict[str, Any]:
    return {name: encoder for name, (_, encoder) in zip(TEXT_ENCODERS, text.clip, strict=True)}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` [B, L + 256, D]: CLIP's features side by side, then T5's; ``pooled_prompt_embeds`` [B, P1 + P2]

    Source: Esser et al. 2024 (arXiv:2403.03206), section 4 and figure 2.
    """
    import torch

    states = [common.clip_states(*pair, captions) for pair in text.clip]
    clip = torch.cat([hidden for hidden, _ in states], dim=-1).float()
    clip = torch.nn.functional.pad(clip, (0, text.width - clip.shape[-1]))  # [B, L, D]
    t5 = clip.new_zeros(len(captions), MAX_T5_TOKENS, text.width)
    if cached is not None:
        t5 = cached["prompt_embeds"][:, clip.shape[1] :]
    elif text.t5 is not None:
        t5 = common.t5_states(*text.t5, captions, MAX_T5_TOKENS).float()  # [B, 256, D]
    pooled = torch.cat([pooled for _, pooled in states], dim=-1)
    return {"prompt_embeds": torch.cat([clip, t5], dim=1), "pooled_prompt_embeds": pooled.float()}


def load_denoiser(model: ModelParams, device: torch.device) -> SD3Transformer2DModel:
    from diffusers import SD3Transformer2DModel

    return common.load_frozen(SD3Transformer2DModel, model, "transformer", device)


def load_scheduler(model: ModelParams) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return common.load_scheduler(FlowMatchEulerDiscreteScheduler, model)


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


def load_pipeline(model: ModelParams, device: torch.device) -> StableDiffusion3Pipeline:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        from diffusers import StableDiffusion3Pipeline
    left = dict.fromkeys(left_out(model))
    return common.load_pipeline(StableDiffusion3Pipeline, model, device, **left)
