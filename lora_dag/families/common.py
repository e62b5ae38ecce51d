"""What the families have in common: frozen components by their named classes, the VAE's latents, token ids.

Weights come from safetensors alone, from the folder alone; nothing in the folder is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core import quiet
from lora_dag.core.files import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

    from lora_dag.core.params import Dtype, ModelParams


def config(model: ModelParams, folder: str) -> dict[str, Any]:
    """A component's config.json."""
    return read_json(Path(model.pretrained) / folder / "config.json")


def load_frozen(cls: Any, model: ModelParams, folder: str, device: torch.device) -> Any:
    """In eval mode, without gradients, in ``model.dtype``."""
    quiet.disable_progress_bars()
    module = cls.from_pretrained(model.pretrained, subfolder=folder, variant=model.variant, **_source(model))
    return module.eval().requires_grad_(False).to(device)


def load_tokenizer(cls: Any, model: ModelParams, folder: str) -> Any:
    return cls.from_pretrained(model.pretrained, subfolder=folder, local_files_only=True)


def load_scheduler(cls: Any, model: ModelParams) -> Any:
    return cls.from_pretrained(model.pretrained, subfolder="scheduler", local_files_only=True)


def load_pipeline(cls: Any, model: ModelParams, device: torch.device, **components: Any) -> Any:
    """The diffusers pipeline, silent.

    Args:
        components: passed instead of what the folder holds, None for what is left out.
    """
    quiet.disable_progress_bars()
    pipeline = cls.from_pretrained(model.pretrained, variant=model.variant, **_source(model), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _source(model: ModelParams) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, model.dtype), "use_safetensors": True, "local_files_only": True}


# The VAE


def vae_scale_factor(model: ModelParams) -> int:
    return 2 ** (len(config(model, "vae")["block_out_channels"]) - 1)


def upcast_vae_dtype(model: ModelParams) -> Dtype:
    """float32 for a VAE whose config says ``force_upcast``, as it does where none says otherwise."""
    return "float32" if config(model, "vae").get("force_upcast", True) else model.dtype


def load_vae(model: ModelParams, device: torch.device, tiling: bool = False) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    vae = load_frozen(AutoencoderKL, model, "vae", device)
    if tiling:
        vae.enable_tiling()
    return vae


def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std, shifted and scaled by the VAE's config."""
    import torch

    with torch.inference_mode():
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What ``encode_images`` does, undone: pixel values, float32 [B, 3, H, W]."""
    import torch

    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    with torch.inference_mode():
        return vae.decode((latents / scale + shift).to(vae.device, vae.dtype)).sample.float()


def decode_in_own_dtype(vae: AutoencoderKL) -> AutoencoderKL:
    """Keeps a float32 VAE's decoder in float32 where the pipeline around it runs in half precision and autocast."""
    import torch

    decode = vae.decode

    def outside_autocast(latents: torch.Tensor, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), **options)

    vae.decode = outside_autocast
    return vae


def no_max_side(model: ModelParams) -> None:
    """Of a denoiser that takes any size."""


def no_view_conditioning(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Of a denoiser that is not told how a picture was cut."""
    return {}


# Captions


def drops_to_empty(model: ModelParams) -> bool:
    """Of a pipeline that encodes the empty caption where no negative prompt is given: nothing is zeros."""
    return False


def input_ids(tokenizer: Any, captions: list[str], max_length: int, device: torch.device) -> torch.Tensor:
    """Token ids, padded and cut to ``max_length``, int64 [B, L]."""
    tokens = tokenizer(captions, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Special tokens included, without truncation."""
    with quiet.no_warnings():  # of "indexing errors": what is encoded is cut, and whoever counts says so
        return [len(ids) for ids in tokenizer(captions, truncation=False).input_ids]


def clip_states(tokenizer: Any, encoder: Any, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last but one layer's states [B, L, D], and the encoder's first output: pooled [B, P] where it projects."""
    ids = input_ids(tokenizer, captions, tokenizer.model_max_length, encoder.device)  # [B, L]
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(tokenizer: Any, encoder: Any, captions: list[str], max_length: int) -> torch.Tensor:
    """The last layer's states [B, L, D], padding attended to as in training."""
    return encoder(input_ids(tokenizer, captions, max_length, encoder.device))[0]
