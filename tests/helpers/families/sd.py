"""Stable Diffusion, tiny: v-prediction; pixels in multiples of 8."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from base.tokenizer import train
from tests.helpers.families import Stock, Tensors
from tests.helpers.pipelines import clip, vae
from tests.helpers.single_files import checkpoint

LOSSES = [0.524272, 0.520498, 0.711396]
ENCODERS = (1, "9c534467b2a4f816")
COMFYUI = ("SD15", {})
SINGLE_FILE = checkpoint


def build() -> StableDiffusionPipeline:
    tokenizer = train(["red apple", "blue boat", "green circle, ink icon"])
    return StableDiffusionPipeline(
        text_encoder=clip(CLIPTextModel, tokenizer),
        vae=vae(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encode(pipe: Any, captions: list[str]) -> Tensors:
    return {"prompt_embeds": pipe.encode_prompt(captions, "cpu", 1, False)[0]}


def call(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    return pipe.unet(noisy, timesteps, encoder_hidden_states=given["prompt_embeds"], return_dict=False)[0]


STOCK = Stock("StableDiffusionPipeline", encode, call)
