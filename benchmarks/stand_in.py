"""Make a base that costs almost nothing, and images: the measured time is then the time around the encoder.

With a real VAE, 10,000 images take minutes on a GPU and a day on two CPU cores. That time would hide the time of DVC,
the store, hashing, decoding and shards. The stand-in has the folder layout and the latent channels of SD 1.5.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lora_dag.core import quiet

SIDE = 96
"""Pixels of the images, before prepare brings them to 64."""


def make_base(folder: Path, text_width: int = 16, attention: bool = False) -> None:
    """Write a random StableDiffusionPipeline of 0.1 M parameters, with 8 pixels per latent pixel.

    Args:
        text_width: features of a token that the UNet takes.
        attention: whether the UNet takes tokens at all.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from base.tokenizer import train

    quiet.disable_progress_bars()
    torch.manual_seed(0)
    tokenizer = train([f"image {index}" for index in range(10)])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D" if attention else "DownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D" if attention else "UpBlock2D",),
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def make_images(folder: Path, count: int, side: int = SIDE) -> None:
    """Write an imagefolder of distinct JPEGs, about 4 KB each at 96 pixels, each with its own caption."""
    folder.mkdir(parents=True)
    for index in range(count):
        make_image(folder, index, seed=index, side=side)
    rows = [{"file_name": file_name(index), "text": f"image {index}"} for index in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_image(folder: Path, index: int, seed: int, side: int = SIDE) -> None:
    """Return coarse noise. Two such images differ in about half of the bits of a difference hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    image.save(folder / file_name(index), quality=90)


def file_name(index: int) -> str:
    return f"{index:05}.jpg"
