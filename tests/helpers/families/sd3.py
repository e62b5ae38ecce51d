"""Stable Diffusion 3.5, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.helpers.families import Stock, Tensors
from tests.helpers.pipelines import clip, clip_tokenizer, t5, t5_tokenizer, vae
from tests.helpers.single_files import sd3_transformer

LOSSES = [1.69002, 1.71176, 1.66376]
ENCODERS = (1, "870952353671c3b2")
COMFYUI = ("SD3", {})
ATTENTIONS = ("0.x_block.attn", "0.x_block.attn2", "0.context_block.attn", "1.x_block.attn", "1.context_block.attn")
ORIGINAL_NORMS = [
    "pos_embed",
    *(f"joint_blocks.{block}.{norm}.weight" for block in ATTENTIONS for norm in ("ln_q", "ln_k")),
]
SINGLE_FILE = sd3_transformer


def build() -> StableDiffusion3Pipeline:
    """Build a pipeline like SD 3.5: normalized queries and keys, a second attention, CLIP padded to T5's width."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 32),
        text_encoder_3=t5(tokenizer_3, 64),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def encode(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    return pipe.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"],
        joint_attention_kwargs=None,
        return_dict=False,
    )[0]


STOCK = Stock("StableDiffusion3Pipeline", encode, call)
