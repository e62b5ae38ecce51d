"""The size that the model sees a picture at: one square, or the bucket nearest to the picture's own shape."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_dag.artifacts.picture_table import enlargement
from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

Size = tuple[int, int]
"""width, height in pixels"""


def fit(width: int, height: int, dataset: DatasetParams) -> Size:
    """The size that a picture of ``width`` x ``height`` pixels is cut and scaled to.

    Raises:
        UserError: a predicate, for the caller to put the picture's name before.
    """
    aspect = max(width, height) / min(width, height)
    if dataset.aspect_buckets and aspect > dataset.max_aspect_ratio:
        raise UserError(
            f"has {width} x {height} pixels, {ceil2(aspect)} times as long as wide; "
            f"crop it, or raise dataset.max_aspect_ratio {dataset.max_aspect_ratio}"
        )
    size = nearest(width, height, buckets(dataset))
    scale = enlargement(width, height, size)
    if scale > dataset.max_upscale:
        raise UserError(
            f"has {width} x {height} pixels and would be enlarged {ceil2(scale)} times to {size[0]} x {size[1]}; "
            f"use a larger picture or a smaller dataset.resolution, or allow it: dataset.max_upscale {ceil2(scale)}"
        )
    return size


def buckets(dataset: DatasetParams) -> tuple[Size, ...]:
    """Every size that a picture can get: a square of ``resolution``; with ``aspect_buckets`` all that are no larger.

    Sides are multiples of ``bucket_step``; for each width the largest height of at most resolution squared pixels,
    and the same turned by a quarter, where the longer side is at most ``max_aspect_ratio`` times the shorter.

    Source: the sizes of kohya-ss/sd-scripts, which start from NovelAI's "aspect ratio bucketing" (2022).
    """
    if not dataset.aspect_buckets:
        return ((dataset.resolution, dataset.resolution),)
    return _buckets(dataset.resolution, dataset.bucket_step, dataset.max_aspect_ratio)


def nearest(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose aspect ratio is nearest by its logarithm, of several the one with most pixels."""
    aspect = math.log(width / height)

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def ceil2(value: float) -> float:
    """Rounded up to two decimals, so that what is advised suffices."""
    return math.ceil(value * 100 - 1e-9) / 100


@lru_cache
def _buckets(resolution: int, step: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    found = set()
    for width in range(step, resolution**2 // step + 1, step):
        height = resolution**2 // width // step * step
        if max(width, height) <= max_aspect_ratio * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))
