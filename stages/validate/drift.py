"""Drift: how much the adapter damages the base model, measured on images that the base model generated itself.

The base generates an image for each of ``validate.drift_prompts``. The images are encoded as in cache_latents, and
base and adapter are scored on them. Training images are not used, so a rising loss means forgetting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import EvalImage

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.metrics import Value
    from stages.validate.heldout_loss import EvalSet, Prompts
    from stages.validate.vae import Vae


@dataclass(frozen=True)
class GeneratedLatents:
    """Latents of generated images in the place of a LatentCache. The key of an image is its prompt."""

    means: dict[str, torch.Tensor]
    """float32 [C, h, w]"""
    prompts: dict[str, dict[str, torch.Tensor]]
    """Prompt -> embeddings of the base's text encoders."""

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean, and zeros as standard deviation."""
        import torch

        return self.means[key], torch.zeros_like(self.means[key])

    def mask(self, key: str) -> torch.Tensor:
        raise LookupError(f"{key}: generated images have no masks")

    def prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        return self.prompts[caption]


@dataclass(frozen=True)
class DriftBaseline:
    """The evaluation set of the base's own images, with the base's losses on it."""

    eval_set: EvalSet
    losses: list[float]
    """Loss of the base on each row."""


def make_drift_set(eval_set: EvalSet, images: dict[str, Image.Image], vae: Vae, encoded: Prompts) -> EvalSet:
    """Return an evaluation set of generated images with the timesteps per image and the seed of ``eval_set``.

    Args:
        images: prompt -> image that the base generated for it.
        encoded: prompt -> embeddings of the base's text encoders.
    """
    means = {prompt: vae.encode(image) for prompt, image in images.items()}
    captions = {}
    for prompt, image in images.items():
        size = image.height, image.width
        captions[prompt] = encoded[prompt] | eval_set.family.view_conditioning(size, (0, 0), size)
    eval_images = [EvalImage(f"drift {prompt}", prompt, "drift", prompt, prompt) for prompt in images]
    num_strata = 1 + max(row.stratum for row in eval_set.rows)
    rows = heldout_table.make_rows(eval_images, num_strata, eval_set.num_train_timesteps, eval_set.seed)
    return replace(eval_set, rows=rows, cache=GeneratedLatents(means, captions))


def metrics(drift: DriftBaseline, losses: list[float]) -> dict[str, Value]:
    """Return ``drift.*``: both losses, and their paired change with its interval over images."""
    changes = [
        (row.image.caption, after - before)
        for row, before, after in zip(drift.eval_set.rows, drift.losses, losses, strict=True)
    ]
    change = bootstrap.estimate(bootstrap.by_image(changes), drift.eval_set.seed)
    return {
        "drift.loss": bootstrap.mean(losses),
        "drift.loss_base": bootstrap.mean(drift.losses),
        **change.named("drift.loss_change"),
    }
