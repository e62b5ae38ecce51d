"""Concepts, captions and rendered images as tensors, for all steps of the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from base.render import BUILD

CONCEPTS = Path(__file__).with_name("concepts.txt")
PIXELS = 64


def concepts() -> list[str]:
    """Return the names of the icons that the base model learns, sorted."""
    return [line for line in CONCEPTS.read_text().splitlines() if line and not line.startswith("#")]


def caption(slug: str, style: str | None = None) -> str:
    """Return the caption of an icon: ``red-apple`` -> ``red apple``, or with a style ``red apple, flat icon``."""
    name = slug.replace("-", " ")
    return f"{name}, {style} icon" if style else name


def load_icon(style: str, slug: str, pixels: int = PIXELS) -> Image.Image:
    """Load one rendered icon in RGB, resized with Lanczos."""
    with Image.open(BUILD / "icons" / style / f"{slug}.png") as image:
        return image.convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)


def pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """Convert images to float32 [N, 3, H, W] in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
