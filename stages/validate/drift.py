"""DriftBaseline: what the adapter costs the base on the base's own ground, on pictures that it drew itself.

The base draws ``validate.drift_prompts``; its pictures are encoded as cache_latents encodes, and base and adapter
answer the same rows about them. Nothing of the training set is in it: a loss that rises there is something forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_dag.evaluation import bootstrap, heldout_table
from lora_dag.evaluation.heldout_table import Picture
from stages.validate.heldout_loss import encode_captions

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.metrics import Value
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.vae import Vae


@dataclass(frozen=True)
class GeneratedLatents:
    """The base's pictures, where an eval_set looks for the cache's: a picture is named by its prompt."""

    means: dict[str, torch.Tensor]
    """float32 [C, h, w]"""
    prompts: dict[str, dict[str, torch.Tensor]]
    """As the base's text encoders say them."""

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean, and no spread around it."""
        import torch

        return self.means[key], torch.zeros_like(self.means[key])

    def mask(self, key: str) -> torch.Tensor:
        raise LookupError(f"{key}: drawn pictures have no masks")

    def prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        return self.prompts[caption]


@dataclass(frozen=True)
class DriftBaseline:
    """What the base was asked about its own pictures, and what it answered."""

    eval_set: EvalSet
    losses: list[float]
    """The base's, one per row."""


def make_eval_set(eval_set: EvalSet, pictures: dict[str, Image.Image], vae: Vae, text: Any) -> EvalSet:
    """The frozen table about drawn pictures, with the eval_set's timesteps per picture and seed.

    Args:
        pictures: prompt -> what the base drew for it.
        text: the family's text object, as the base has it.
    """
    means = {prompt: vae.encode(picture) for prompt, picture in pictures.items()}
    captions = encode_captions(eval_set, list(pictures), text)
    for prompt, picture in pictures.items():
        size = picture.height, picture.width
        captions[prompt] |= eval_set.family.view_conditioning(size, (0, 0), size)
    known = [Picture(f"drift {prompt}", prompt, "drift", prompt, prompt) for prompt in pictures]
    num_strata = 1 + max(row.stratum for row in eval_set.rows)
    rows = heldout_table.table(known, num_strata, eval_set.num_train_timesteps, eval_set.seed)
    return replace(eval_set, rows=rows, cache=GeneratedLatents(means, captions))


def metrics(drift: DriftBaseline, losses: list[float]) -> dict[str, Value]:
    """``drift.*``: both losses, and the paired change with its interval over pictures."""
    changes = [
        (row.picture.caption, after - before)
        for row, before, after in zip(drift.eval_set.rows, drift.losses, losses, strict=True)
    ]
    change = bootstrap.estimate(bootstrap.by_picture(changes), drift.eval_set.seed)
    return {
        "drift.loss": bootstrap.mean(losses),
        "drift.loss_base": bootstrap.mean(drift.losses),
        **change.named("drift.loss_change"),
    }
