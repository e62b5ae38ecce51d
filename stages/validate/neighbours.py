"""Memorisation and diversity: how near the samples are to training pictures, and how far from each other.

Pictures are points: by default their latents (posterior means, root mean square difference), or what an image model
embeds them as. A distance to the nearest training picture means something beside two others: that of the base's sample
for the same prompt from the same noise, which never saw the training pictures, and that of real pictures which were
held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_dag.artifacts.metrics import tidy
from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from lora_dag.core.progress import counted
from lora_dag.evaluation import bootstrap, heldout_table

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.artifacts.metrics import Value
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.vae import Vae

COPIED_QUANTILE = 0.05
BLANK = 3.0  # standard deviation of its pixels, 0 to 255: one colour, but for what the VAE leaves of it
NUM_WORST = 6  # rows of nearest.png, a prompt each
FIELDS = ("prompt", "seed", "distance", "nearest", "copied", "base_distance", "base_nearest", "base_copied")


class ImageModel(Protocol):
    """What features.FeatureModel is; the distance is Euclid's."""

    @property
    def name(self) -> str: ...

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pictures -> points, float32 [N, D]."""
        ...


@dataclass(frozen=True)
class Sample:
    """One drawn picture, and the training picture that is nearest to it."""

    prompt: str
    index: int
    """Which of the prompt's pictures."""
    picture: Image.Image
    distance: float
    """NaN where there is no training picture of its shape."""
    nearest: str
    """File name of the training picture."""
    view: str
    """Key of its latents."""

    @property
    def is_blank(self) -> bool:
        return float(np.asarray(self.picture.convert("RGB"), np.float64).std(axis=(0, 1)).max()) < BLANK


@dataclass(frozen=True)
class Neighbours:
    """Samples of base and final adapter in one order, and the scale that held-out pictures give."""

    base: list[Sample]
    adapter: list[Sample]
    heldout: np.ndarray
    """Distance of each held-out picture to its nearest training picture, float64."""
    diversity: tuple[float, float]
    """Of base and adapter."""
    num_views: int
    """Views of training pictures that were compared."""

    @property
    def threshold(self) -> float:
        """Below it a sample counts as copied: the 5 % quantile of the held-out pictures' distances. NaN without any.

        Pictures of the same kind that nobody copied are that near by chance once in twenty times, so a share of about
        0.05 is what an adapter shows that learned the kind and no picture. Of n < 19 held-out pictures it is the
        smallest distance, and that share 1 / (n + 1). A fixed distance would depend on resolution, VAE and subject; a
        smaller quantile of a few dozen held-out pictures would be their minimum. Near duplicates never stand on both
        sides of the split, so that the scale holds no copies itself.

        Weibull's quantile, p (n + 1) in order: one more draw is below it with probability p, where NumPy's own
        choice, 1 + p (n - 1), gives 0.08 of 25 and 0.19 of 5. Source: Hyndman & Fan 1996, definition 6.
        """
        return float(np.quantile(self.heldout, COPIED_QUANTILE, method="weibull")) if len(self.heldout) else math.nan

    @property
    def far_threshold(self) -> float:
        """Above it a sample is unlike the dataset: the 95 % quantile of the same distances, with the same share of it.

        Noise is far from everything; samples of a style that was learned are not, also of things that are new to it.
        """
        return (
            float(np.quantile(self.heldout, 1 - COPIED_QUANTILE, method="weibull")) if len(self.heldout) else math.nan
        )

    def far_share(self, samples: Sequence[Sample]) -> float:
        """NaN where nothing can be told."""
        if math.isnan(self.threshold):
            return math.nan
        return bootstrap.mean(sample.distance > self.far_threshold for sample in samples)

    def copied(self, sample: Sample) -> bool:
        return sample.distance < self.threshold

    def copied_share(self, samples: Sequence[Sample]) -> float:
        """NaN where nothing can be told."""
        if math.isnan(self.threshold):
            return math.nan
        return bootstrap.mean(self.copied(sample) for sample in samples)

    @property
    def worst(self) -> list[tuple[Sample, Sample]]:
        """Of the NUM_WORST worst prompts the adapter's sample that is nearest to a training picture, and the base's."""
        pairs = sorted(zip(self.adapter, self.base, strict=True), key=lambda pair: pair[0].distance)
        by_prompt: dict[str, tuple[Sample, Sample]] = {}
        for pair in pairs:
            by_prompt.setdefault(pair[0].prompt, pair)
        return list(by_prompt.values())[:NUM_WORST]


@dataclass(frozen=True)
class FeatureSpace:
    """Where pictures are points.

    Latents are compared between pictures of one shape, the samples': a training picture of another bucket is another
    crop, and resized latents are no picture's. An image model takes every shape, training pictures as the VAE decodes
    them: both sides then went through one decoder.
    """

    eval_set: EvalSet
    cache: LatentCache
    vae: Vae
    model: ImageModel | None = None
    """None for latents."""

    @property
    def name(self) -> str:
        return "latents" if self.model is None else self.model.name

    def comparable(self, view: str) -> bool:
        return self.model is not None or tuple(self.cache.latents(view)[0].shape[-2:]) == self.eval_set.picture_size

    def features_of_views(self, views: Sequence[str]) -> Iterator[np.ndarray]:
        """A point of each."""
        if self.model is None:
            yield from (flat(self.cache.latents(view)[0]) for view in views)
            return
        for start in range(0, len(views), self.eval_set.batch_size):
            some = views[start : start + self.eval_set.batch_size]
            yield from self.model.images([self.vae.decode(self.cache.latents(view)[0]) for view in some])

    def features_of_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """[N, D]"""
        if self.model is None:
            shown = counted("samples", pictures, len(pictures))
            return np.stack([flat(self.vae.encode(picture)) for picture in shown])
        return self.model.images(pictures)

    def trained_views(self) -> list[tuple[str, str]]:
        """File name and key of every view of every training picture; pictures for regularization are no evidence."""
        items = [item for item in self.cache.items if item.split == "train" and not item.regularization]
        return [(item.file_name, view) for item in items for view in item.views if self.comparable(view)]

    def heldout_views(self) -> list[str]:
        return [view for view in self.eval_set.heldout_views if self.comparable(view)]


def flat(latents: torch.Tensor) -> np.ndarray:
    """As a point whose distance to another is the root mean square of their difference, float32 [C * h * w]."""
    return latents.numpy().ravel() / np.float32(math.sqrt(latents.numel()))


def compare(
    space: FeatureSpace, prompts: list[str], base: list[list[Image.Image]], adapter: list[list[Image.Image]]
) -> Neighbours:
    """Find every sample's nearest training picture, and every held-out picture's.

    Args:
        base: its pictures, by index and then by prompt.
        adapter: the same of the final adapter.
    """
    pictures = [picture for drawn in (*base, *adapter) for picture in drawn]
    points = space.features_of_pictures(pictures)  # [2 * seeds * prompts, D]
    views, heldout = space.trained_views(), space.features_of_views(space.heldout_views())
    known = counted("nearest", space.features_of_views([view for _, view in views]), len(views))
    distances, nearest = find_nearest(np.stack([*points, *heldout]), known)
    asked = [(prompt, index) for index in range(len(base)) for prompt in prompts]
    samples = [
        Sample(prompt, index, picture, float(distance), *(views[position] if position >= 0 else ("", "")))
        for (prompt, index), picture, distance, position in zip(asked * 2, pictures, distances, nearest, strict=False)
    ]
    half, found = len(asked), distances[len(pictures) :]
    spread = [diversity(part.reshape(len(base), len(prompts), -1)) for part in (points[:half], points[half:])]
    return Neighbours(samples[:half], samples[half:], found[~np.isnan(found)], (spread[0], spread[1]), len(views))


def find_nearest(asked: np.ndarray, known: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each row of ``asked`` [N, D] to its nearest of ``known``, float64 [N], and which that is.

    One known point at a time, by subtraction: a copy is at 0 exactly, and memory does not grow with the training set.
    NaN and -1 where nothing is known.
    """
    distances, nearest = np.full(len(asked), np.inf), np.full(len(asked), -1)
    for position, point in enumerate(known):
        found = np.linalg.norm(asked - point, axis=1)
        nearer = found < distances
        distances[nearer], nearest[nearer] = found[nearer], position
    return np.where(nearest < 0, np.nan, distances), nearest


def diversity(points: np.ndarray) -> float:
    """Mean distance between two pictures of one prompt, over pairs and prompts; NaN for one picture per prompt.

    Args:
        points: [seeds, prompts, D].
    """
    pairs = combinations(points, 2)
    return bootstrap.mean(float(value) for one, other in pairs for value in np.linalg.norm(one - other, axis=1))


# Reports


def metrics(found: Neighbours) -> dict[str, Value]:
    """``samples.*``: null where there is nothing to compare with."""
    values: dict[str, Value] = {}
    for suffix, samples, spread in (("_base", found.base, found.diversity[0]), ("", found.adapter, found.diversity[1])):
        values[f"samples.copied_share{suffix}"] = found.copied_share(samples)
        values[f"samples.far_share{suffix}"] = found.far_share(samples)
        values[f"samples.blank_share{suffix}"] = bootstrap.mean(sample.is_blank for sample in samples)
        values[f"samples.nearest_distance{suffix}"] = median([sample.distance for sample in samples])
        values[f"samples.diversity{suffix}"] = spread
    return values


def scale(found: Neighbours, space: FeatureSpace) -> dict[str, Value]:
    """What the distances mean, for lineage.json."""
    return {
        "space": space.name,
        "num_training_views": found.num_views,
        "num_heldout": len(found.heldout),
        "heldout_median": tidy(median(found.heldout)),
        "threshold": tidy(found.threshold),
        "far_threshold": tidy(found.far_threshold),
    }


def median(values: Sequence[float] | np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def write(folder: Path, found: Neighbours, vae: Vae, cache: LatentCache, cells: Sequence[int]) -> None:
    """nearest.csv, a row per prompt and seed, and nearest.png with the worst of them."""
    from lora_dag.pages.sheets import MAX_BYTES, save_sheet, sheet

    lines = [
        (after.prompt, after.index, *columns(found, after), *columns(found, before))
        for before, after in zip(found.base, found.adapter, strict=True)
    ]
    write_text(folder / "nearest.csv", heldout_table.write_csv(FIELDS, lines))
    rows = [[shown for one in pair for shown in (one.picture, known_picture(one, vae, cache))] for pair in found.worst]
    captions = [[text for one in pair for text in (f"at {one.distance:.3g}", one.nearest)] for pair in found.worst]
    labels = [after.prompt for after, _ in found.worst]
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(one.prompt for one in found.base), 1)}
    begins = [f"{order[after.prompt]}. seed {after.index}: " for after, _ in found.worst]
    heads = ["adapter", "nearest training picture", "base", "nearest training picture"]
    title = f"Nearest to the training pictures; copied is below {found.threshold:.3g}"
    save_sheet(
        folder / "nearest.png",
        lambda side: sheet(rows, labels, heads, side, title, captions, begins),
        cells,
        MAX_BYTES["nearest"],
    )


def columns(found: Neighbours, sample: Sample) -> tuple[str, str, int]:
    return f"{sample.distance:.6g}", sample.nearest, int(found.copied(sample))


def known_picture(sample: Sample, vae: Vae, cache: LatentCache) -> Image.Image | None:
    """The training picture as the VAE decodes it: the stage reads latents, no pictures."""
    return vae.decode(cache.latents(sample.view)[0]) if sample.view else None


def require_few_copied(found: Neighbours, limit: float | None, folder: Path) -> None:
    """Raises UserError: more samples are copies than ``validate.max_copied_share`` lets pass, or nobody can tell.

    The reports stand by then, for a person to look at; DVC and Snakemake take the stage for failed.
    """
    share = found.copied_share(found.adapter)
    if limit is None or share <= limit:
        return
    where = f"params.yaml validate.max_copied_share: {limit:g}"
    if math.isnan(share):
        raise UserError(f"{where} cannot be checked: no held-out or training picture has the samples' shape; use null")
    raise UserError(
        f"{where}, but {share:.3g} of the samples are copies of training pictures; look at {folder / 'nearest.png'}, "
        "then train fewer steps or a smaller rank, or add pictures"
    )
