"""Z-Image (base and Turbo): ZImageTransformer2DModel, flow matching, and Qwen3 as the text encoder, through its chat.

The transformer takes lists: pictures, and for each the features of its caption's own tokens, without padding. Here
they are padded to the longest that the pipeline reads, beside a mask, so that store, cache and batches hold tensors of
one shape as for every family; ``predict`` takes the mask's tokens out again, and the transformer sees what the
pipeline would give it. Its timesteps run from noise (0) to picture (1), and it predicts the picture minus the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dag.core.console import UserError
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
"""The chat's own tokens included. Source: ZImagePipeline, ``max_sequence_length``."""

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
    """By the rotary embedding's tables: the first axis counts tokens and pictures, the others rows and columns."""
    return min(common.config(model, "transformer")["axes_lens"][1:]) * pixel_multiple(model)


def load_tokenizer(model: ModelParams, folder: str = "tokenizer") -> Qwen2Tokenizer:
    """Raises UserError for one without the chat template that every caption is put into."""
    tokenizer = common.load_tokenizer(model, folder)
    if not tokenizer.chat_template:
        where = f"{model.pretrained}/{folder}: no chat template"
        raise UserError(f"{where} (chat_template.jinja, or in tokenizer_config.json); fetch the model again")
    return tokenizer


def max_tokens(model: ModelParams) -> int:
    return MAX_TOKENS


def count_tokens(model: ModelParams, captions: list[str]) -> list[int]:
    tokenizer = load_tokenizer(model)
    return common.num_tokens(tokenizer, chats(tokenizer, captions))


def chats(tokenizer: Qwen2Tokenizer, captions: list[str]) -> list[str]:
    """Each caption as a person's message, up to where the answer would begin."""
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
    """``prompt_embeds`` [B, 512, D]: the last but one layer's states, 0 where ``prompt_embeds_mask`` [B, 512] is 0."""
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
    pictures = list(noisy_latents.unsqueeze(2))  # each [C, 1, h, w]: one frame
    model_pred = denoiser(pictures, (1000 - timesteps) / 1000, captions).sample
    return -torch.stack(list(model_pred)).squeeze(2)
