"""FLUX.1 (dev and schnell): FluxTransformer2DModel on packed latents, flow matching, T5, and CLIP's pooled output.

``dev`` is distilled for guidance: the scale is an input of the transformer, and no negative prompt is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.core import quiet
from lora_dag.families import common

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Tokenizer

    from lora_dag.core.params import ModelParams

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
"""The target is the velocity of the data itself, which is what a scale of 1 means: the other scales keep their meaning.

Source: diffusers' examples/dreambooth/README_flux.md, ``--guidance_scale=1``.
"""

vae_scale_factor = common.vae_scale_factor
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
drops_to_zeros = common.drops_to_empty
max_side = common.no_max_side


def left_out(model: ModelParams) -> tuple[str, ...]:
    return ()


def pixel_multiple(model: ModelParams) -> int:
    return vae_scale_factor(model) * 2


def load_tokenizer(model: ModelParams) -> T5Tokenizer:
    """T5's: what CLIP cuts is in its pooled output alone."""
    from transformers import T5Tokenizer

    return common.load_tokenizer(T5Tokenizer, model, "tokenizer_2")


def max_tokens(model: ModelParams) -> int:
    return MAX_T5_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    return common.count_tokens(load_tokenizer(model), captions)


def load_text(model: ModelParams, device: torch.device) -> list[tuple[Any, Any]]:
    """Tokenizer and encoder of CLIP and of T5."""
    from transformers import T5EncoderModel

    t5 = load_tokenizer(model), common.load_frozen(T5EncoderModel, model, "text_encoder_2", device)
    return [*load_trainable_text(model, device), t5]


def load_trainable_text(model: ModelParams, device: torch.device) -> list[tuple[Any, Any]]:
    """CLIP's alone."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = common.load_tokenizer(CLIPTokenizer, model, "tokenizer")
    return [(tokenizer, common.load_frozen(CLIPTextModel, model, "text_encoder", device))]


def text_of(pipeline: FluxPipeline) -> list[tuple[Any, Any]]:
    return [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]


def text_encoders(text: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {"text_encoder": text[0][1]}


def encode_prompts(
    text: list[tuple[Any, Any]], captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """``prompt_embeds`` [B, 512, D] of T5, ``pooled_prompt_embeds`` [B, P] of CLIP."""
    tokenizer, encoder = text[0]
    ids = common.input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    pooled = encoder(ids).pooler_output.float()
    if cached is not None:
        return {"pooled_prompt_embeds": pooled}
    prompt_embeds = common.t5_states(*text[1], captions, MAX_T5_TOKENS).float()
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def load_denoiser(model: ModelParams, device: torch.device) -> FluxTransformer2DModel:
    from diffusers import FluxTransformer2DModel

    return common.load_frozen(FluxTransformer2DModel, model, "transformer", device)


def load_scheduler(model: ModelParams) -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return common.load_scheduler(FlowMatchEulerDiscreteScheduler, model)


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
    """[B, C, h, w] -> [B, h/2 * w/2, 4 C]: patches of 2x2, the channel outermost in each."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, h/2 * w/2, 4 C] -> [B, C, h, w], what `pack` does undone."""
    grid = patches.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # [B, h/2, w/2, C, 2, 2]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Place of each patch for the rotary embedding: 0, row, column; float32 [rows * columns, 3]."""
    import torch

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float().to(device)


def load_pipeline(model: ModelParams, device: torch.device) -> FluxPipeline:
    with quiet.no_warnings():  # image processors that ask for torchvision, which nothing here needs
        from diffusers import FluxPipeline
    return common.load_pipeline(FluxPipeline, model, device)
