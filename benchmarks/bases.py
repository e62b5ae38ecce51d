"""Random bases in the diffusers layout: Stable Diffusion 1.5 and XL by their published configs, and small ones.

Weights are torch's initialization with seed 0, so nothing is downloaded and every machine builds the same base. Speed
does not depend on the values of weights. Sources: the config.json files of
stable-diffusion-v1-5/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core import quiet

if TYPE_CHECKING:
    import torch

CAPTIONS = [f"image {index}" for index in range(10)]  # what the tokenizer has seen
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Base:
    name: str
    family: str
    resolution: int
    """Pixels of the square that it is trained on here."""
    vae_scale_factor: int
    """Pixels per latent pixel, in each direction."""
    rank: int
    """Rank of the adapter."""
    parts: Callable[[], dict[str, Any]]
    """Components that have weights."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return random components on the current default device, so that FLOPs can be counted on ``meta``."""
        import torch

        torch.manual_seed(0)
        return self.parts()

    def build(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the pipeline's folder, with weights in ``dtype``."""
        quiet.disable_progress_bars()
        with quiet.without_warnings():  # image processors that need torchvision, modules without a float32 part
            from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

            modules = {name: module.to(dtype) for name, module in self.modules().items()}
        tokenizer = make_tokenizer(modules["text_encoder"].config.max_position_embeddings)
        scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        shared = modules | {"tokenizer": tokenizer, "scheduler": scheduler}
        if self.family == "sdxl":
            pipeline = StableDiffusionXLPipeline(**shared, tokenizer_2=tokenizer, add_watermarker=False)
        else:
            without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**shared, **without)
        pipeline.save_pretrained(folder, safe_serialization=True)


def sd15(resolution: int, thinner: int = 1) -> dict[str, Any]:
    """Return Stable Diffusion 1.5 with its widths divided by ``thinner``, for 512 pixels."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=resolution // 8,
        block_out_channels=tuple(width // thinner for width in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // thinner,
        attention_head_dim=8,  # heads, in this config
        norm_num_groups=num_groups(thinner),
    )
    return {
        "unet": unet,
        "vae": sd_vae(resolution, thinner, scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(clip(768, 12, 12, "quick_gelu", thinner)),
    }


def sdxl(resolution: int, thinner: int = 1) -> dict[str, Any]:
    """Return Stable Diffusion XL with its widths divided by ``thinner``, for 1024 pixels."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=resolution // 8,
        block_out_channels=tuple(width // thinner for width in (320, 640, 1280)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048 // thinner,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 // thinner,
        projection_class_embeddings_input_dim=(6 * 256 + 1280) // thinner,
        norm_num_groups=num_groups(thinner),
    )
    return {
        "unet": unet,
        "vae": sd_vae(resolution, thinner, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIPTextModel(clip(768, 12, 12, "quick_gelu", thinner)),
        "text_encoder_2": CLIPTextModelWithProjection(clip(1280, 32, 20, "gelu", thinner)),
    }


def tiny() -> dict[str, Any]:
    """Return the embedded base's UNet with a VAE and a text encoder whose share of the FLOPs is the share in SD 1.5."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=192,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 192),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(clip(192, 1, 3, "quick_gelu", max_tokens=20))}


SD15 = Base("SD 1.5", "sd", 512, 8, 16, partial(sd15, 512))
SDXL = Base("SDXL", "sdxl", 1024, 8, 16, partial(sdxl, 1024))
QUARTER = Base("quarter", "sd", 128, 8, 4, partial(sd15, 128, thinner=4))
"""SD 1.5 at a quarter of its width and of its side: a step's parts take the same shares of its FLOPs."""
TINY = Base("tiny", "sd", 64, 4, 8, tiny)
"""The embedded base's UNet, and a VAE so wide that its encode takes, in time on a CPU, 1.4 of the UNet's forward."""
DRY_SD15 = Base("SD 1.5, thin", "sd", 64, 8, 2, partial(sd15, 64, thinner=16))
DRY_SDXL = Base("SDXL, thin", "sdxl", 64, 8, 2, partial(sdxl, 64, thinner=16))


def sd_vae(resolution: int, thinner: int, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=tuple(width // thinner for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=num_groups(thinner),
        sample_size=resolution,
        **options,
    )


def num_groups(thinner: int) -> int:
    """Return the number of groups of a group normalization: 32, or fewer if 32 does not divide the channels."""
    return min(32, 64 // thinner)


def clip(
    hidden_size: int, num_layers: int, num_heads: int, hidden_act: str, thinner: int = 1, max_tokens: int = CLIP_TOKENS
) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = make_tokenizer(max_tokens)
    return CLIPTextConfig(
        hidden_size=hidden_size // thinner,
        intermediate_size=4 * hidden_size // thinner,
        projection_dim=hidden_size // thinner,
        num_hidden_layers=max(1, num_layers // thinner**2),  # thinner models see fewer pixels, and as many tokens
        num_attention_heads=num_heads,
        hidden_act=hidden_act,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@cache
def make_tokenizer(max_tokens: int) -> Any:
    from base.tokenizer import train

    tokenizer = train(CAPTIONS)
    tokenizer.model_max_length = max_tokens
    return tokenizer
