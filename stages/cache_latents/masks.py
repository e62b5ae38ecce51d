"""Masks of views: the weight of each latent pixel's loss. No model is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind
from lora_dag.core.console import UserError
from lora_dag.core.progress import Bar
from lora_dag.pictures.masks import cut_mask, decode_mask
from stages.cache_latents.context import Context, mask_file, naming_changes, read_checked
from stages.cache_latents.encoding import NUM_READERS, Recent
from stages.cache_latents.keys import mask_key
from stages.cache_latents.views import plan

if TYPE_CHECKING:
    import torch
    from PIL import Image

NUM_MASKS = 256  # made and stored at a time


class MaskBuilder:
    """Weight of each latent pixel's loss, for every view of a picture that has a mask. No model is asked."""

    kind: Kind = "masks"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.factor = context.family.vae_scale_factor(context.model)
        self.decoded = Recent(self.decode, NUM_READERS)
        self.keys, self.jobs = plan(
            context, lambda item, view: mask_key(item, view, context.manifest, self.factor) if item.mask else None
        )

    def fill(self, keys: list[str]) -> None:
        """Make these.

        Raises:
            UserError: a mask is not the one that prepare checked, or hides all of a view, so that no loss would be
                left; all such masks are named.
        """
        black: set[str] = set()
        naming_changes(lambda: self._make(keys, black), self.context, [self.jobs[key].item for key in keys])
        if black:
            raise UserError(*black_problems(self, black))

    def _make(self, keys: list[str], black: set[str]) -> None:
        """Store these, but for those that are zero all over, which are added to ``black``."""
        with ThreadPoolExecutor(NUM_READERS) as pool, Bar(self.kind, len(keys)) as bar:
            for start in range(0, len(keys), NUM_MASKS):
                some = keys[start : start + NUM_MASKS]
                for key, weights in zip(some, pool.map(self.read, some), strict=True):
                    if weights.any():
                        self.context.save(self.kind, key, {"mask": weights})
                    else:
                        black.add(key)
                bar.add(len(some))

    def read(self, key: str) -> torch.Tensor:
        """float32 [1, H/f, W/f]."""
        item, view = self.jobs[key].item, self.jobs[key].view
        mask = cut_mask(self.decoded(item), item, view)
        return mask_weights(mask, self.factor, self.context.manifest.unmasked_weight)

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.read, *mask_file(item))
        return decode_mask(blob, "alpha" if item.mask == "alpha" else "file")


def black_problems(masks: MaskBuilder, black: set[str]) -> list[str]:
    """One line per picture with a view whose mask is zero all over."""
    manifest = masks.context.manifest
    smaller_crop = "set dataset.crop to center, " if manifest.augmentation.crop == "random" else ""
    problems = []
    for item in manifest.items:
        keys = masks.keys[item.file_name]
        numbers = [str(number) for number, key in enumerate(keys, 1) if key in black]
        if numbers:
            views = f"view{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {len(keys)}"
            problems.append(
                f"{Path(manifest.source) / item.file_name}: its mask hides all of {views}, so no loss is left; "
                f"{smaller_crop}set dataset.unmasked_weight above 0, or mend the mask"
            )
    return problems


def mask_weights(mask: np.ndarray, factor: int, unmasked_weight: float) -> torch.Tensor:
    """[H, W] of 0 to 1 -> float32 [1, H/f, W/f] of unmasked_weight to 1: the mean over each latent pixel's area."""
    import torch

    height, width = mask.shape
    means = mask.astype(np.float64).reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))
    return torch.from_numpy(unmasked_weight + (1 - unmasked_weight) * means).float()[None]
