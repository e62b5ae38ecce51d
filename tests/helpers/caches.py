"""Caches made by hand: latents, masks and embeddings that a test can tell apart, of any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_dag.artifacts import latent_cache
from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
from lora_dag.bases import component_files
from lora_dag.core import params, seeding
from lora_dag.core.params import ModelParams
from lora_dag.families import sd

WIDE, TALL, SQUARE = (4, 12), (12, 4), (8, 8)
"""Height and width of latents."""


def write_cache(
    folder: Path,
    items: list[CachedItem],
    means: dict[str, torch.Tensor],
    embeds: dict[str, torch.Tensor],
    *,
    masks: dict[str, torch.Tensor] | None = None,
    std: float = 0.0,
    base: dict[str, str] | None = None,
) -> LatentCache:
    """data/latents of these items.

    Args:
        means: view key -> [C, h, w].
        embeds: caption -> [L, D]; holds the empty caption too.
        masks: mask key -> [1, h, w].
        std: of every posterior.
    """
    keys = {caption: f"c{index}" for index, caption in enumerate(embeds)}
    by_key = {keys[caption]: tensor for caption, tensor in embeds.items()}

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        if kind == "images":
            return {"mean": means[key], "std": torch.full_like(means[key], std)}
        return {"mask": (masks or {})[key]} if kind == "masks" else {"prompt_embeds": by_key[key]}

    latent_cache.write(folder, items, keys, base or {}, ["prompt_embeds"], load)
    return LatentCache(folder)


def write_mixed_cache(folder: Path = Path("data/latents"), **every: Any) -> LatentCache:
    """Twelve images of three shapes for the base of ./params.yaml; five have masks, others repeats or a weight.

    Three wide and two tall ones are held out; two more images are for regularization, one of each side.
    ``every`` is set in all items.
    """
    settings: list[tuple[tuple[int, int], dict[str, Any]]] = [
        (WIDE, {"masked": True}),
        (WIDE, {"repeats": 2}),
        (WIDE, {"split": "heldout"}),
        (WIDE, {"split": "heldout", "masked": True}),
        (TALL, {"masked": True, "loss_weight": 0.5}),
        (TALL, {}),
        (TALL, {"split": "heldout", "masked": True}),
        (TALL, {"split": "heldout"}),
        (SQUARE, {"regularization": True, "loss_weight": 0.25}),
        (SQUARE, {"masked": True}),
        (WIDE, {"split": "heldout"}),
        (SQUARE, {"split": "heldout", "regularization": True}),
    ]
    items, means, masks = [], {}, {}
    embeds = {"": draw("empty", (5, 32))}
    for index, (shape, known) in enumerate(settings):
        views = (f"{index}a", f"{index}b")
        captions = (f"caption {index}", f"caption {index}, other")
        means |= {key: draw(key, (4, *shape)) for key in views}
        embeds |= {caption: draw(caption, (5, 32)) for caption in captions}
        fields: dict[str, Any] = {"split": "train"} | known | every
        if fields.pop("masked", False):
            fields["masks"] = tuple(f"m{key}" for key in views)
            masks |= {f"m{key}": half_mask(shape, view) for view, key in enumerate(views)}
        known_by = {"caption": captions[0], "captions": captions, "content": f"content {index}"}
        items.append(CachedItem(f"{index:02}.png", views=views, **known_by | fields))
    base = component_files.digests(params.load(Path("params.yaml")).section(ModelParams), sd.COMPONENTS)
    return write_cache(folder, items, means, embeds, masks=masks, std=0.1, base=base)


def half_mask(shape: tuple[int, int], view: int) -> torch.Tensor:
    """Black in its upper half; below, half or all of the weight."""
    mask = torch.zeros(1, *shape)
    mask[:, shape[0] // 2 :] = 0.5
    mask[:, shape[0] // 2 :, view::2] = 1.0
    return mask


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Noise that goes by the name."""
    return torch.randn(shape, generator=seeding.generator(0, "cache", name))
