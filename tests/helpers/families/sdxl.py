"""Stable Diffusion XL, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.helpers.families import Stock, Tensors
from tests.helpers.pipelines import clip, clip_tokenizer, vae
from tests.helpers.single_files import checkpoint

LOSSES = [1.17276, 1.21496, 1.09037]
ENCODERS = (1, "ca76443bb64e0c06")
COMFYUI = ("SDXL", {})
SINGLE_FILE = checkpoint


def build() -> StableDiffusionXLPipeline:
    """Build encoders of 16 and 32 features, so that a swap is noticed; pixels in multiples of 8."""
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16 + 32,
            attention_head_dim=4,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def encode(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["add_time_ids"]}
    return pipe.unet(
        noisy,
        timesteps,
        encoder_hidden_states=given["prompt_embeds"],
        timestep_cond=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


STOCK = Stock("StableDiffusionXLPipeline", encode, call)
