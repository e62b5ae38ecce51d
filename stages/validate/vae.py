"""Encode images to latents and decode latents to images, with the VAE in the dtype of cache_latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_dag.core.device import autocast
from lora_dag.core.progress import show_elapsed

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from stages.validate.heldout_loss import EvalSet


class Vae:
    """VAE in the dtype that cache_latents encodes in. It takes one image at a time to limit memory.

    Args:
        loaded: VAE of the pipeline that draws, which is used if it has this dtype.
    """

    def __init__(self, eval_set: EvalSet, loaded: Any = None) -> None:
        import torch

        self.family, self.device = eval_set.family, eval_set.device
        self.model = eval_set.model.model_copy(update={"dtype": eval_set.family.vae_dtype(eval_set.model)})
        is_same = loaded is not None and loaded.dtype == getattr(torch, self.model.dtype)
        self.vae = loaded if is_same else eval_set.family.load_vae(self.model, self.device)
        for vae in {id(vae): vae for vae in (loaded, self.vae) if vae is not None}.values():
            show_elapsed(vae.encoder, "encode", "images")
            show_elapsed(vae.decoder, "decode", "images")

    def encode(self, image: Image.Image) -> torch.Tensor:
        """Return the posterior's mean with the cache's shift and scale, float32 [C, H/f, W/f]."""
        import torch

        pixel_values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        with torch.inference_mode(), autocast(self.device, self.model):
            mean, _ = self.family.encode_images(self.vae, pixel_values[None])
        return mean[0].float().cpu()

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """Return the image of latents [C, H/f, W/f]."""
        import torch
        from PIL import Image

        with torch.inference_mode(), autocast(self.device, self.model):
            pixel_values = self.family.decode_latents(self.vae, latents[None])[0].float()  # [3, H, W]
        levels = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        return Image.fromarray(levels.cpu().numpy())
