"""GeneratedLatents pictures as latents and latents as pictures, by the VAE as cache_latents loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_dag.core.device import autocast

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from stages.validate.heldout_loss import EvalSet


class Vae:
    """In the dtype that cache_latents encodes in; one picture at a time: no more memory for more of them."""

    def __init__(self, eval_set: EvalSet) -> None:
        self.family, self.device = eval_set.family, eval_set.device
        self.model = eval_set.model.model_copy(update={"dtype": eval_set.family.vae_dtype(eval_set.model)})
        self.vae = eval_set.family.load_vae(self.model, self.device)

    def encode(self, picture: Image.Image) -> torch.Tensor:
        """The posterior's mean with the cache's shift and scale, float32 [C, H/f, W/f]."""
        import torch

        pixel_values = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        with torch.inference_mode(), autocast(self.device, self.model):
            mean, _ = self.family.encode_images(self.vae, pixel_values[None])
        return mean[0].float().cpu()

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """The picture of one view, [C, H/f, W/f]."""
        import torch
        from PIL import Image

        with torch.inference_mode(), autocast(self.device, self.model):
            pixel_values = self.family.decode_latents(self.vae, latents[None])[0].float()  # [3, H, W]
        levels = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        return Image.fromarray(levels.cpu().numpy())
