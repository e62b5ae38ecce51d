"""What the tests of images share: encoded images, things like photographs, section ``dataset`` with changes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from stages.prepare.params import DatasetParams
from tests.helpers.workspace import REPOSITORY

DEFAULTS = YAML(typ="safe", pure=True).load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))["dataset"]


def dataset(**changes: Any) -> DatasetParams:
    """The repository's section ``dataset`` with some values changed."""
    return DatasetParams.model_validate(DEFAULTS | changes)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth colors with some grain, another scene for each seed."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (6, 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + draw.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def see_through(image: Image.Image) -> Image.Image:
    """Its left half, with the right one transparent."""
    alpha = Image.new("L", image.size)
    alpha.paste(255, (0, 0, image.width // 2, image.height))
    image.putalpha(alpha)
    return image
