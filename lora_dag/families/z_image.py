"""Z-Image (base and Turbo): ZImageTransformer2DModel, flow matching, and Qwen3 with its chat template for captions.

The transformer's inputs are lists: images, and the features of each caption's tokens without padding. Here they are
padded to the pipeline's limit, with a mask, so that store, cache and batches have tensors of one shape as for every
family; ``predict`` removes the padding again, so that the transformer's input is that of the pipeline.
The transformer's timesteps run from noise (0) to image (1), and it predicts the image minus the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.core.console import Problem, UserError
from lora_dag.families import common
from lora_dag.families.protocol import SingleFile

if TYPE_CHECKING:
    import torch
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer

    from lora_dag.core.params import ModelParams
    from lora_dag.families.common import Text

PIPELINE = "ZImagePipeline"
COMPONENTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "Qwen3Model",
    "tokenizer": "Qwen2Tokenizer",
    "transformer": "ZImageTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
OPTIONAL = ()
VAE = ("vae",)
TEXT = ("tokenizer", "text_encoder")
TEXT_ENCODERS: dict[str, int] = {}
DENOISER = "transformer"
NO_GUIDANCE = 0.0  # the pipeline adds guidance_scale * (prompt - negative prompt) to the prompt's prediction
MAX_TOKENS = 512
"""Limit with the tokens of the chat template. Source: ZImagePipeline, ``max_sequence_length``."""

HUB_TAG = "z_image"
MODELSPEC = "z-image"
COMFYUI = {"transformer": "transformer."}
ORIGINAL_LAYERS = {
    "x_embedder": "all_x_embedder.2-1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    **{
        f"{blocks}.{{i}}.{there}": f"{blocks}.{{i}}.{ours}"
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for there, ours in {
            "adaLN_modulation.0": "adaLN_modulation.0",
            "attention.qkv": "attention. to_q to_k to_v",
            "attention.out": "attention.to_out.0",
            "feed_forward.w1": "feed_forward.w1",
            "feed_forward.w2": "feed_forward.w2",
            "feed_forward.w3": "feed_forward.w3",
        }.items()
    },
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "final_layer.linear": "all_final_layer.2-1.linear",
}
PRESET_LAYERS = {"feed_forward": r"feed_forward\.w[123]"}
SINGLE_FILE = SingleFile()

left_out = common.nothing_left_out
vae_scale_factor = common.vae_scale_factor
pixel_multiple = common.pixels_of_2x2_latents
vae_dtype = common.upcast_vae_dtype
load_vae = common.load_vae
encode_images = common.encode_images
decode_latents = common.decode_latents
view_conditioning = common.no_view_conditioning
drops_to_zeros = common.drops_to_empty
load_text = common.load_text
load_trainable_text = common.load_trainable_text
text_of = common.text_of
load_denoiser = common.load_denoiser
load_scheduler = common.load_scheduler
load_pipeline = common.load_pipeline


def max_side(model: ModelParams) -> int:
    """Return the longest side in pixels by the rotary embedding: its axes are tokens and images, rows, columns."""
    return min(common.config(model, "transformer")["axes_lens"][1:]) * pixel_multiple(model)


def load_tokenizer(model: ModelParams, folder: str = "tokenizer") -> Qwen2Tokenizer:
    """Load the tokenizer; raise UserError if it has no chat template, which every caption needs."""
    tokenizer = common.load_tokenizer(model, folder)
    if not tokenizer.chat_template:
        text = f"{model.pretrained}/{folder}: no chat template (chat_template.jinja, or in tokenizer_config.json)."
        raise UserError(Problem("base-incomplete", f"{text} Fetch the model again."))
    return tokenizer


def max_tokens(model: ModelParams) -> int:
    return MAX_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    tokenizer = load_tokenizer(model)
    return common.num_tokens(tokenizer, chats(tokenizer, captions))


def chats(tokenizer: Qwen2Tokenizer, captions: list[str]) -> list[str]:
    """Return each caption as a user's message in the chat template, up to the start of the assistant's turn."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]


def text_encoders(text: Text) -> dict[str, Any]:
    return {}


def encode_prompts(
    text: Text, captions: list[str], cached: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return ``prompt_embeds`` [B, 512, D] and ``prompt_embeds_mask`` [B, 512].

    ``prompt_embeds`` are the second-to-last layer's states, and 0 for padding.
    """
    tokenizer, encoder = text["text_encoder"]
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(chats(tokenizer, captions), max_length=MAX_TOKENS, **options).to(encoder.device)
    mask = tokens.attention_mask.bool()  # [B, L]
    states = encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return {
        "prompt_embeds": states.float().masked_fill(~mask[..., None], 0.0),  # [B, L, D]
        "prompt_embeds_mask": mask.float(),
    }


def predict(
    denoiser: ZImageTransformer2DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt: dict[str, torch.Tensor],
) -> torch.Tensor:
    import torch

    masks = prompt["prompt_embeds_mask"].bool()
    captions = [embeds[mask] for embeds, mask in zip(prompt["prompt_embeds"], masks, strict=True)]  # each [its L, D]
    images = list(noisy_latents.unsqueeze(2))  # each [C, 1, h, w]: one frame
    model_pred = denoiser(images, (1000 - timesteps) / 1000, captions).sample
    return -torch.stack(list(model_pred)).squeeze(2)
