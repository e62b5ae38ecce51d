"""Masks of views: the loss weight of each latent pixel. No model is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind
from lora_dag.core.console import Problem, UserError
from lora_dag.core.progress import Bar
from lora_dag.images.masks import cut_mask, decode_mask
from stages.cache_latents.context import Context, mask_file, read_checked, report_changed_files
from stages.cache_latents.encoding import NUM_READERS, FutureCache
from stages.cache_latents.keys import mask_key
from stages.cache_latents.views import plan_views

if TYPE_CHECKING:
    import torch
    from PIL import Image

NUM_MASKS = 256  # masks per chunk that is made and stored


class MaskBuilder:
    """Maker of the masks of views: the loss weight of each latent pixel, for images that have a mask."""

    kind: Kind = "masks"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.factor = context.family.vae_scale_factor(context.model)
        self.decoded = FutureCache(self.decode, NUM_READERS)
        self.keys, self.jobs = plan_views(
            context, lambda item, view: mask_key(item, view, context.manifest, self.factor) if item.mask else None
        )

    def fill(self, keys: list[str]) -> None:
        """Make the masks of these keys.

        Raises:
            UserError: a problem per mask that changed since prepare checked it or that hides a whole view, which would
                leave no loss.
        """
        black: set[str] = set()
        report_changed_files(lambda: self._make(keys, black), self.context, [self.jobs[key].item for key in keys])
        if black:
            raise UserError(*black_problems(self, black))

    def _make(self, keys: list[str], black: set[str]) -> None:
        """Store the masks of these keys; add the keys of masks that are zero everywhere to ``black`` instead."""
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
        """Return the mask of a view, float32 [1, H/f, W/f]."""
        item, view = self.jobs[key].item, self.jobs[key].view
        mask = cut_mask(self.decoded(item), item, view)
        return mask_weights(mask, self.factor, self.context.manifest.unmasked_weight)

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.read, *mask_file(item))
        return decode_mask(blob, "alpha" if item.mask == "alpha" else "file")


def black_problems(masks: MaskBuilder, black: set[str]) -> list[Problem]:
    """Return a problem per image with a view whose mask is zero everywhere."""
    manifest = masks.context.manifest
    fix = "Set dataset.crop: center or " if manifest.augmentation.crop == "random" else "Set "
    problems = []
    for item in manifest.items:
        keys = masks.keys[item.file_name]
        numbers = [str(number) for number, key in enumerate(keys, 1) if key in black]
        if numbers:
            views = f"view{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {len(keys)}"
            problems.append(
                Problem(
                    "mask-hides-all",
                    f"{Path(manifest.source) / item.file_name}: the mask hides all of {views}, which leaves no loss. "
                    f"{fix}dataset.unmasked_weight above 0, or repair the mask.",
                )
            )
    return problems


def mask_weights(mask: np.ndarray, factor: int, unmasked_weight: float) -> torch.Tensor:
    """Return the mean of a mask over each latent pixel's area.

    [H, W] of 0 to 1 -> float32 [1, H/f, W/f] of unmasked_weight to 1.
    """
    import torch

    height, width = mask.shape
    means = mask.astype(np.float64).reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))
    return torch.from_numpy(unmasked_weight + (1 - unmasked_weight) * means).float()[None]
