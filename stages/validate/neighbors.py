"""Memorization and diversity: distances of samples to the nearest training images, and to each other.

An image is a point: by default its latents (posterior mean, root mean square difference), or its embedding by an image
model. A sample's distance to the nearest training image is compared with two others: the distance of the base's sample
for the same prompt and noise, and the distances of held-out images. Neither has seen the training images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_dag.artifacts.metrics import rounded
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import write_text
from lora_dag.core.progress import counted
from lora_dag.evaluation import bootstrap, heldout_table

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.artifacts.metrics import Value
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams
    from stages.validate.vae import Vae

COPIED_QUANTILE = 0.05
BLANK = 3.0  # standard deviation of pixels, 0 to 255; the VAE leaves a little noise in a single color
NUM_WORST = 6  # rows of nearest.png, a prompt each
FIELDS = ("prompt", "seed", "distance", "nearest", "copied", "base_distance", "base_nearest", "base_copied")


class ImageModel(Protocol):
    """The part of features.FeatureModel that is used here. Distances of its points are Euclidean."""

    @property
    def name(self) -> str: ...

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return a point per image, float32 [N, D]."""
        ...


@dataclass(frozen=True)
class Sample:
    """A generated image with its nearest training image."""

    prompt: str
    index: int
    """Number of the image among those of its prompt."""
    image: Image.Image
    distance: float
    """Distance to the nearest training image; NaN if no training image has its shape."""
    nearest: str
    """File name of the training image."""
    view: str
    """Key of the training image's latents."""

    @property
    def is_blank(self) -> bool:
        """Whether the image has a single color."""
        return float(np.asarray(self.image.convert("RGB"), np.float64).std(axis=(0, 1)).max()) < BLANK


@dataclass(frozen=True)
class Neighbors:
    """Samples of base and final adapter in the same order, and the distances of held-out images as their scale."""

    base: list[Sample]
    adapter: list[Sample]
    heldout: np.ndarray
    """Distance of each held-out image to its nearest training image, float64 [images]."""
    diversity: tuple[float, float]
    """Diversity of base and adapter."""
    num_views: int
    """Number of views of training images that were compared."""

    @property
    def threshold(self) -> float:
        """Distance below which a sample counts as copied: 5 % quantile of the held-out images' distances, or NaN.

        Of new images of the same kind, one in twenty is that near by chance. So a copied share of about 0.05 is
        expected from an adapter that learned the kind of image and copies none. With n < 19 held-out images the
        threshold is their smallest distance, and the expected share 1 / (n + 1). A fixed distance would depend on
        resolution, VAE and subject. Near-duplicates are never split between training and held-out set, so the scale
        itself contains no copies.

        Weibull's quantile, at position p (n + 1): a further draw is below it with probability p. NumPy's default, at
        1 + p (n - 1), would give 0.08 for 25 images and 0.19 for 5. Source: Hyndman & Fan 1996, definition 6.
        """
        return float(np.quantile(self.heldout, COPIED_QUANTILE, method="weibull")) if len(self.heldout) else math.nan

    @property
    def far_threshold(self) -> float:
        """Distance above which a sample counts as unlike the dataset: 95 % quantile of the held-out images' distances.

        Noise is far from every image. Samples in a learned style are not, even if they show new things.
        """
        return (
            float(np.quantile(self.heldout, 1 - COPIED_QUANTILE, method="weibull")) if len(self.heldout) else math.nan
        )

    def far_share(self, samples: Sequence[Sample]) -> float:
        """Return the share of samples unlike the dataset; NaN without a threshold."""
        if math.isnan(self.threshold):
            return math.nan
        return bootstrap.mean(sample.distance > self.far_threshold for sample in samples)

    def copied(self, sample: Sample) -> bool:
        """Return whether a sample counts as copied."""
        return sample.distance < self.threshold

    def copied_share(self, samples: Sequence[Sample]) -> float:
        """Return the share of copied samples; NaN without a threshold."""
        if math.isnan(self.threshold):
            return math.nan
        return bootstrap.mean(self.copied(sample) for sample in samples)

    @property
    def worst(self) -> list[tuple[Sample, Sample]]:
        """Adapter's and base's sample of the NUM_WORST prompts whose samples are nearest to a training image."""
        pairs = sorted(zip(self.adapter, self.base, strict=True), key=lambda pair: pair[0].distance)
        by_prompt: dict[str, tuple[Sample, Sample]] = {}
        for pair in pairs:
            by_prompt.setdefault(pair[0].prompt, pair)
        return list(by_prompt.values())[:NUM_WORST]


@dataclass(frozen=True)
class FeatureSpace:
    """Space in which images are points: latents, or embeddings of an image model.

    Latents are only compared between images of the samples' shape, since resized latents belong to no image. An image
    model takes every shape. It gets training images as the VAE decodes them, like the samples.
    """

    eval_set: EvalSet
    cache: LatentCache
    vae: Vae
    model: ImageModel | None = None
    """None to compare latents."""

    @property
    def name(self) -> str:
        return "latents" if self.model is None else self.model.name

    def is_comparable(self, view: str) -> bool:
        """Return whether a view can be compared with the samples."""
        return self.model is not None or tuple(self.cache.latents(view)[0].shape[-2:]) == self.eval_set.image_size

    def features_of_views(self, views: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the point of each view."""
        if self.model is None:
            yield from (as_point(self.cache.latents(view)[0]) for view in views)
            return
        for start in range(0, len(views), self.eval_set.batch_size):
            some = views[start : start + self.eval_set.batch_size]
            yield from self.model.embed_images([self.vae.decode(self.cache.latents(view)[0]) for view in some])

    def features_of_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the points of images, [N, D]."""
        if self.model is None:
            progress = counted("samples", images, len(images))
            return np.stack([as_point(self.vae.encode(image)) for image in progress])
        return self.model.embed_images(images)

    def trained_views(self) -> list[tuple[str, str]]:
        """Return file name and key of every comparable view of training images, without regularization images."""
        items = [item for item in self.cache.items if item.split == "train" and not item.regularization]
        return [(item.file_name, view) for item in items for view in item.views if self.is_comparable(view)]

    def heldout_views(self) -> list[str]:
        """Return the keys of the comparable held-out views."""
        return [view for view in self.eval_set.heldout_views if self.is_comparable(view)]


def as_point(latents: torch.Tensor) -> np.ndarray:
    """Return a point, float32 [C * h * w], whose distance to others is the root mean square difference."""
    return latents.numpy().ravel() / np.float32(math.sqrt(latents.numel()))


def find_neighbors(
    space: FeatureSpace, prompts: list[str], base: list[list[Image.Image]], adapter: list[list[Image.Image]]
) -> Neighbors:
    """Find the nearest training image of every sample and of every held-out image.

    Args:
        base: samples of the base, by seed and then by prompt.
        adapter: samples of the final adapter, by seed and then by prompt.
    """
    images = [image for by_prompt in (*base, *adapter) for image in by_prompt]
    points = space.features_of_images(images)  # [2 * seeds * prompts, D]
    views, heldout = space.trained_views(), space.features_of_views(space.heldout_views())
    training = counted("nearest", space.features_of_views([view for _, view in views]), len(views))
    distances, nearest = find_nearest(np.stack([*points, *heldout]), training)
    origins = [(prompt, index) for index in range(len(base)) for prompt in prompts]
    samples = [
        Sample(prompt, index, image, float(distance), *(views[position] if position >= 0 else ("", "")))
        for (prompt, index), image, distance, position in zip(origins * 2, images, distances, nearest, strict=False)
    ]
    half, scale = len(origins), distances[len(images) :]
    spread = [diversity(part.reshape(len(base), len(prompts), -1)) for part in (points[:half], points[half:])]
    return Neighbors(samples[:half], samples[half:], scale[~np.isnan(scale)], (spread[0], spread[1]), len(views))


def find_nearest(points: np.ndarray, candidates: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each of ``points`` [N, D] to its nearest candidate, float64 [N], and its position [N].

    Candidates are subtracted one at a time: a copy has the distance 0 exactly, and memory does not grow with the
    training set. Without candidates the results are NaN and -1.
    """
    distances, nearest = np.full(len(points), np.inf), np.full(len(points), -1)
    for position, candidate in enumerate(candidates):
        to_candidate = np.linalg.norm(points - candidate, axis=1)
        nearer = to_candidate < distances
        distances[nearer], nearest[nearer] = to_candidate[nearer], position
    return np.where(nearest < 0, np.nan, distances), nearest


def diversity(points: np.ndarray) -> float:
    """Return the mean distance between two images of one prompt, over pairs and prompts; NaN with one image per prompt.

    Args:
        points: [seeds, prompts, D].
    """
    pairs = combinations(points, 2)
    return bootstrap.mean(float(value) for one, other in pairs for value in np.linalg.norm(one - other, axis=1))


# Reports


def metrics(neighbors: Neighbors) -> dict[str, Value]:
    """Return the ``samples.*`` metrics of base and adapter; NaN if there is nothing to compare with."""
    values: dict[str, Value] = {}
    by_suffix = {"_base": neighbors.base, "": neighbors.adapter}
    for (suffix, samples), spread in zip(by_suffix.items(), neighbors.diversity, strict=True):
        values[f"samples.copied_share{suffix}"] = neighbors.copied_share(samples)
        values[f"samples.far_share{suffix}"] = neighbors.far_share(samples)
        values[f"samples.blank_share{suffix}"] = bootstrap.mean(sample.is_blank for sample in samples)
        values[f"samples.nearest_distance{suffix}"] = median([sample.distance for sample in samples])
        values[f"samples.diversity{suffix}"] = spread
    return values


def distance_scale(neighbors: Neighbors, space: FeatureSpace) -> dict[str, Value]:
    """Return space, reference distances and thresholds for lineage.json."""
    return {
        "space": space.name,
        "num_training_views": neighbors.num_views,
        "num_heldout": len(neighbors.heldout),
        "heldout_median": rounded(median(neighbors.heldout)),
        "threshold": rounded(neighbors.threshold),
        "far_threshold": rounded(neighbors.far_threshold),
    }


def median(values: Sequence[float] | np.ndarray) -> float:
    """Return the median; NaN without values."""
    return float(np.median(values)) if len(values) else math.nan


def write_reports(folder: Path, neighbors: Neighbors, vae: Vae, cache: LatentCache, cells: Sequence[int]) -> None:
    """Write nearest.csv, a row per prompt and seed, and nearest.png with the nearest pairs."""
    from lora_dag.pages.sheets import MAX_BYTES, save_sheet, sheet

    lines = [
        (after.prompt, after.index, *columns(neighbors, after), *columns(neighbors, before))
        for before, after in zip(neighbors.base, neighbors.adapter, strict=True)
    ]
    write_text(folder / "nearest.csv", heldout_table.csv_text(FIELDS, lines))
    rows = [
        [image for one in pair for image in (one.image, decoded_training_image(one, vae, cache))]
        for pair in neighbors.worst
    ]
    captions = [[text for one in pair for text in (f"at {one.distance:.3g}", one.nearest)] for pair in neighbors.worst]
    labels = [after.prompt for after, _ in neighbors.worst]
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(one.prompt for one in neighbors.base), 1)}
    begins = [f"{order[after.prompt]}. seed {after.index}: " for after, _ in neighbors.worst]
    heads = ["adapter", "nearest training image", "base", "nearest training image"]
    title = f"Nearest to the training images; copied is below {neighbors.threshold:.3g}"
    save_sheet(
        folder / "nearest.png",
        lambda side: sheet(rows, labels, heads, side, title, captions, begins),
        cells,
        MAX_BYTES["nearest"],
    )


def columns(neighbors: Neighbors, sample: Sample) -> tuple[str, str, int]:
    """Return the cells of a sample in nearest.csv: distance, file name, 1 if copied."""
    return f"{sample.distance:.6g}", sample.nearest, int(neighbors.copied(sample))


def decoded_training_image(sample: Sample, vae: Vae, cache: LatentCache) -> Image.Image | None:
    """Return the nearest training image, decoded from its latents: the stage reads no image files."""
    return vae.decode(cache.latents(sample.view)[0]) if sample.view else None


def require_copied_share(neighbors: Neighbors, settings: ValidateParams, folder: Path) -> None:
    """Check ``validate.max_copied_share`` after the reports are written, so that a person can look at them.

    Raises:
        UserError: more samples are copies, or there is no threshold.
    """
    limit, share = settings.max_copied_share, neighbors.copied_share(neighbors.adapter)
    if limit is None or share <= limit:
        return
    setting = settings.setting("max_copied_share")
    if math.isnan(share):
        reason = "no held-out or no training image has the samples' shape"
        raise UserError(
            Problem("copies-unknown", f"{setting}: {limit:g} cannot be checked, because {reason}. Use null.")
        )
    remedy = f"See {folder / 'nearest.png'}, then train fewer steps, use a smaller rank, or add images."
    raise UserError(
        Problem(
            "too-many-copies",
            f"{setting}: {limit:g} is the limit, but {share:.3g} of the samples copy training images. {remedy}",
        )
    )
