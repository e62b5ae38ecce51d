"""Folders with the published configs of well-known models, and no weights, for forecasts of their memory.

Sources: the config.json files of stabilityai/stable-diffusion-3.5-medium and -large, black-forest-labs/FLUX.1-dev and
Tongyi-MAI/Z-Image-Turbo; benchmarks/bases.py for Stable Diffusion 1.5 and XL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import bases
from tests.helpers.pipelines import qwen_tokenizer, t5_tokenizer


@dataclass(frozen=True)
class TrueSize:
    label: str
    family: str
    resolution: int
    num_parameters: int
    """Parameters of the denoiser."""
    parts: Callable[[], dict[str, Any]]
    """Components with weights, built on ``meta``."""


def sd3_parts(num_layers: int, dual_layers: int) -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=num_layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * num_layers,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384 if dual_layers else 192,
        dual_attention_layers=tuple(range(dual_layers)),
        qk_norm="rms_norm",
    )
    return {
        "transformer": transformer,
        "vae": vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": CLIPTextModelWithProjection(bases.clip(768, 12, 12, "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(bases.clip(1280, 32, 20, "gelu")),
        "text_encoder_3": t5_xxl(),
    }


def flux_parts() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),  # the class's defaults are those of FLUX.1
        "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": CLIPTextModel(bases.clip(768, 12, 12, "quick_gelu")),
        "text_encoder_2": t5_xxl(),
    }


def z_image_parts() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        )
    )
    return {
        "transformer": ZImageTransformer2DModel(),  # the class's defaults are those of Z-Image
        "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": encoder,
    }


def t5_xxl() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def vae(latent_channels: int, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


TRUE_SIZES = {
    "sd15": TrueSize("Stable Diffusion 1.5", "sd", 512, 859_520_964, bases.SD15.parts),
    "sdxl": TrueSize("SDXL", "sdxl", 1024, 2_567_463_684, bases.SDXL.parts),
    "sd35-medium": TrueSize("SD 3.5 medium", "sd3", 1024, 2_243_171_520, lambda: sd3_parts(24, 13)),
    "sd35-large": TrueSize("SD 3.5 large", "sd3", 1024, 8_056_627_520, lambda: sd3_parts(38, 0)),
    "flux1": TrueSize("FLUX.1 dev", "flux", 1024, 11_901_408_320, flux_parts),
    "z-image": TrueSize("Z-Image", "z_image", 1024, 6_154_908_736, z_image_parts),
}


def save_configs(size: TrueSize, folder: Path) -> None:
    """Write the configs, tokenizers and model_index.json of a model, without weights."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    from lora_dag.core.files import write_json
    from lora_dag.families.protocol import load_family

    family = load_family(size.family)
    with torch.device("meta"):
        parts = size.parts()
    for name, module in parts.items():
        if name.startswith("text_encoder"):
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
    for name in family.COMPONENTS:
        if name.startswith("tokenizer"):
            kind = family.COMPONENTS[name]
            make = {"T5Tokenizer": t5_tokenizer, "Qwen2Tokenizer": qwen_tokenizer}.get(kind)
            (make() if make else bases.make_tokenizer(77)).save_pretrained(folder / name)
    flow = family.COMPONENTS["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDPMScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {"_class_name": family.PIPELINE})
