"""FLUX.1, tiny: a block of each kind."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.helpers.families import Stock, Tensors
from tests.helpers.pipelines import clip, clip_tokenizer, t5, t5_tokenizer, vae

LOSSES = [1.72353, 1.67101, 1.56854]
ENCODERS = (1, "b8b4542d662dd1f2")
COMFYUI = (
    "Flux",
    {
        "image_model": "flux",
        **{"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": 32},
        **{"hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1},
        **{"axes_dim": [4, 4, 8], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []},
    },
)
ORIGINAL_NORMS = [
    f"{block}.{norm}.scale"
    for block in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm")
    for norm in ("query_norm", "key_norm")
]
SINGLE_FILE = None


def build(guidance_embeds: bool = True) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=t5(tokenizer_2, 32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=4 * 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def encode(pipe: Any, captions: list[str]) -> Tensors:
    prompt_embeds, pooled, _ = pipe.encode_prompt(captions, None)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def call(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    count, channels, height, width = noisy.shape
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.full([count], 1.0) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=given["pooled_prompt_embeds"],
        encoder_hidden_states=given["prompt_embeds"],
        txt_ids=torch.zeros(given["prompt_embeds"].shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    return pipe._unpack_latents(packed, height * factor, width * factor, factor)


def unpack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    side = int(latents.shape[1] ** 0.5) * 2 * pipe.vae_scale_factor
    return pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)


STOCK = Stock("FluxPipeline", encode, call, unpack, timesteps=lambda given: given * 1000)
