"""The VAE's output for every view: posterior mean and std, and SDXL's conditioning on size and crop."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lora_dag.artifacts.manifest import Item, View
from lora_dag.artifacts.store import Kind
from lora_dag.images.decode import cut_view, decode
from stages.cache_latents.context import Context, read_checked, report_changed_files
from stages.cache_latents.encoding import NUM_READERS, Encoder, FutureCache, Shape, Tensors
from stages.cache_latents.fill_store import encode_into_store
from stages.cache_latents.keys import Setting, image_key
from stages.cache_latents.views import plan_views

if TYPE_CHECKING:
    import torch
    from PIL import Image


class LatentEncoder:
    """Encoder of every view: posterior mean and std."""

    kind: Kind = "latents"
    unit = "view"

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        self.decoded = FutureCache(self.decode, NUM_READERS)
        self.keys, self.jobs = plan_views(context, lambda item, view: image_key(item, view, context.manifest, setting))

    def fill(self, keys: list[str]) -> None:
        """Encode the views of these keys.

        Raises:
            UserError: a problem per image that changed since prepare checked it.
        """
        items = [self.jobs[key].item for key in keys]
        report_changed_files(lambda: encode_into_store(self, self.encoder, keys), self.context, items)

    def save(self, key: str, tensors: Tensors) -> None:
        self.context.save(self.kind, key, tensors)

    def reuse(self, keys: list[str]) -> list[str]:
        """Return all keys: latents have one form."""
        return keys

    @cached_property
    def encoder(self) -> Encoder[torch.Tensor]:
        import torch

        model = self.context.model.model_copy(update={"dtype": self.setting.dtype})
        vae = self.context.family.load_vae(model, self.context.device, self.setting.tiling)

        def encode(pixel_values: list[torch.Tensor]) -> Tensors:
            mean, std = self.context.family.encode_images(vae, torch.stack(pixel_values))
            return {"mean": mean, "std": std}  # [B, C, H/f, W/f]

        size = self.setting.batch_size
        return Encoder(self.kind, self.read, encode, torch.zeros_like, self.shape, model, self.context.device, size)

    def read(self, key: str) -> torch.Tensor:
        """Return the pixels of a view, float32 [3, H, W] in [-1, 1]."""
        import torch

        item, view = self.jobs[key].item, self.jobs[key].view
        image = cut_view(self.decoded(item), item, view, self.context.manifest.preprocessing)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.read, item.file_name, item.sha256)
        return decode(blob, self.context.manifest.preprocessing)

    def shape(self, key: str) -> Shape:
        return self.jobs[key].item.width, self.jobs[key].item.height

    def conditioning(self, key: str) -> Tensors:
        """Return the conditioning on the view's size and crop. It follows from the key, so it is not stored."""
        job = self.jobs[key]
        return self.context.family.view_conditioning(*geometry(job.item, job.view))

    def units(self, key: str) -> int:
        return math.prod(self.shape(key))


def geometry(item: Item, view: View) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return original size, crop top left and target size in pixels, heights first, as SDXL's training counts them.

    The crop is counted in the scaled and mirrored image. Source: Podell et al. 2023
    (arXiv:2307.01952), algorithm 1; diffusers' train_text_to_image_lora_sdxl.py, ``crop_top_left``.
    """
    left, top, right, bottom = view.crop
    left = item.source_width - right if view.flip else left
    crop_top_left = round(top * item.height / (bottom - top)), round(left * item.width / (right - view.crop[0]))
    return (item.source_height, item.source_width), crop_top_left, (item.height, item.width)
