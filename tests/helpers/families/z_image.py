"""Z-Image, tiny."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.helpers.families import Stock, Tensors
from tests.helpers.pipelines import qwen, qwen_tokenizer, vae

LOSSES = [1.63893, 1.70048, 1.58624]
ENCODERS = (1, "e8b68857baa6a4e1")
COMFYUI = (
    "ZImage",
    {
        "image_model": "lumina2",
        **{"patch_size": 2, "in_channels": 16, "dim": 32, "cap_feat_dim": 32, "n_layers": 2, "n_refiner_layers": 1},
        **{"n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [4, 6, 6], "axes_lens": [1024, 32, 32]},
        **{"z_image_modulation": True, "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3},
    },
)
ORIGINAL_NORMS: list[str] = []
SINGLE_FILE = None


def build() -> ZImagePipeline:
    """Build the pipeline, with padding tokens other than the initial zeros."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=(4, 6, 6),
        axes_lens=(1024, 32, 32),
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        vae=vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def encode(pipe: Any, captions: list[str]) -> Tensors:
    """Return the pipeline's list of [length, D], padded with zeros to the limit."""
    embeds, _ = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)  # it edits the list
    found = {"prompt_embeds": torch.zeros(len(embeds), 512, embeds[0].shape[1])}
    found["prompt_embeds_mask"] = torch.zeros(len(embeds), 512)
    for index, own in enumerate(embeds):
        found["prompt_embeds"][index, : len(own)] = own
        found["prompt_embeds_mask"][index, : len(own)] = 1
    return found


def call(pipe: Any, noisy: torch.Tensor, timesteps: torch.Tensor, given: Tensors) -> torch.Tensor:
    lengths = given["prompt_embeds_mask"].sum(1).int()
    embeds = [padded[:length] for padded, length in zip(given["prompt_embeds"], lengths, strict=True)]
    inputs = (1000 - timesteps) / 1000
    output = pipe.transformer(list(noisy.unsqueeze(2).unbind(dim=0)), inputs, embeds, return_dict=False)[0]
    return -unpack(pipe, output)


def unpack(pipe: Any, latents: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([frames.squeeze(1) for frames in latents])


STOCK = Stock(
    "ZImagePipeline",
    encode,
    call,
    unpack,
    sign=-1,
    options={"guidance_scale": 0.0},
    timesteps=lambda given: 1000 - given * 1000,
)
