"""Target sizes: the square, or the aspect-ratio bucket, that each image is cropped and scaled to."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_dag.artifacts.image_table import enlargement
from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

Size = tuple[int, int]
"""width, height in pixels"""


def fit(width: int, height: int, dataset: DatasetParams) -> Size:
    """Return the size that an image of ``width`` x ``height`` pixels is cropped and scaled to.

    Raises:
        UserError: too long, or too small. The text is a predicate: the caller puts the image's name before it.
    """
    aspect = max(width, height) / min(width, height)
    if dataset.aspect_buckets and aspect > dataset.max_aspect_ratio:
        raise UserError(
            Problem(
                "image-too-long",
                f"has {width} x {height} pixels, so one side is {ceil2(aspect)} times the other. Crop it, or raise "
                f"dataset.max_aspect_ratio from {dataset.max_aspect_ratio} to {ceil2(aspect)}.",
            )
        )
    size = nearest(width, height, buckets(dataset))
    scale = enlargement(width, height, size)
    if scale > dataset.max_upscale:
        raise UserError(
            Problem(
                "image-too-small",
                f"has {width} x {height} pixels and would be enlarged {ceil2(scale)} times to {size[0]} x {size[1]}. "
                f"Use a larger image, lower dataset.resolution, or set dataset.max_upscale to {ceil2(scale)}.",
            )
        )
    return size


def buckets(dataset: DatasetParams) -> tuple[Size, ...]:
    """Return every target size: the square of ``resolution``, or all buckets with ``aspect_buckets``.

    The sides of a bucket are multiples of ``bucket_step``. Each width is paired with the largest height that gives at
    most resolution squared pixels, and each pair is also turned by a quarter. The longer side is at most
    ``max_aspect_ratio`` times the shorter.

    Source: the sizes of kohya-ss/sd-scripts, which start from NovelAI's "aspect ratio bucketing" (2022).
    """
    if not dataset.aspect_buckets:
        return ((dataset.resolution, dataset.resolution),)
    return _buckets(dataset.resolution, dataset.bucket_step, dataset.max_aspect_ratio)


def nearest(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """Return the size with the nearest aspect ratio by its logarithm. Among equals, the one with most pixels."""
    aspect = math.log(width / height)

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def ceil2(value: float) -> float:
    """Return a value rounded up to two decimals, so that a suggested limit suffices."""
    return math.ceil(value * 100 - 1e-9) / 100


@lru_cache
def _buckets(resolution: int, step: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    sizes = set()
    for width in range(step, resolution**2 // step + 1, step):
        height = resolution**2 // width // step * step
        if max(width, height) <= max_aspect_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))
