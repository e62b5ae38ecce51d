"""Metrics besides the losses on the evaluation set: names and values for reports/metrics.json.

To add a metric, add a function to MEASURES, and its description to lora_dag/evaluation/metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dag.evaluation import bootstrap
from stages.validate import cost, features, neighbors

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.metrics import Value
    from stages.validate.features import FeatureModel
    from stages.validate.inputs import Inputs
    from stages.validate.neighbors import FeatureSpace, Neighbors
    from stages.validate.score_snapshots import ScoresAndSamples
    from stages.validate.vae import Vae


@dataclass(frozen=True)
class Results:
    """Losses, samples and nearest training images of base and adapter."""

    inputs: Inputs
    scored: ScoresAndSamples
    nearest: Neighbors
    space: FeatureSpace
    """Space of the distances in ``nearest``."""
    vae: Vae
    feature_model: FeatureModel | None
    num_passes: int
    """Passes of the denoiser that were computed; cache hits do not count."""

    @property
    def samples(self) -> dict[str, list[Image.Image]]:
        """Ending of a metric's name (``_base`` or empty) -> the first sample of each prompt."""
        images = self.scored.images
        return {"_base": images[0][0], "": images[max(images)][0]}


def measure(results: Results) -> dict[str, Value]:
    """Return all metrics of MEASURES."""
    return {name: value for each in MEASURES for name, value in each(results).items()}


def ink(results: Results) -> dict[str, Value]:
    """Return chroma (0 to 255) and dark share (0 to 1), means over samples; empty without ``validate.ink_measures``."""
    import numpy as np

    from lora_dag.images.color_measures import chroma, dark_share

    values: dict[str, Value] = {}
    for ending, images in results.samples.items() if results.inputs.settings.ink_measures else ():
        arrays = [np.asarray(image) for image in images]
        values[f"samples.chroma{ending}"] = bootstrap.mean(map(chroma, arrays))
        values[f"samples.dark_share{ending}"] = bootstrap.mean(map(dark_share, arrays))
    return values


def copies_and_diversity(results: Results) -> dict[str, Value]:
    """Return shares of copies, outliers and blank samples, distances, and diversity."""
    return neighbors.metrics(results.nearest)


def drift(results: Results) -> dict[str, Value]:
    """Return the ``drift.*`` metrics; empty without ``validate.drift_prompts``."""
    return results.scored.drift


def arithmetic(results: Results) -> dict[str, Value]:
    """Return the arithmetic of one training image."""
    inputs = results.inputs
    return {"cost.tflop_per_image": cost.tflop_per_image(inputs.eval_set, inputs.adapter, inputs.cache)}


def fit_to_prompts_and_images(results: Results) -> dict[str, Value]:
    """Return the metrics of the feature model; empty without one."""
    if results.feature_model is None:
        return {}
    base, adapter = results.samples.values()
    return features.measure(
        results.feature_model, results.inputs.eval_set, results.inputs.settings.prompts, base, adapter, results.vae
    )


MEASURES: tuple[Callable[[Results], dict[str, Value]], ...] = (
    ink,
    copies_and_diversity,
    drift,
    arithmetic,
    fit_to_prompts_and_images,
)
