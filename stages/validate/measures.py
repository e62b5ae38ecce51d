"""Everything that is measured beside the losses on the held-out table: names and values for reports/metrics.json.

A new metric is one function in MEASURES, in a module of its own where it is long, and its row in
lora_dag/evaluation/metrics.py, from which all pages are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dag.evaluation import bootstrap
from stages.validate import cost, features, neighbours

if TYPE_CHECKING:
    from PIL import Image

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.latent_cache import LatentCache
    from lora_dag.artifacts.metrics import Value
    from stages.validate.features import FeatureModel
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.neighbours import Neighbours
    from stages.validate.params import ValidateParams
    from stages.validate.score_snapshots import ScoresAndSamples
    from stages.validate.vae import Vae


@dataclass(frozen=True)
class Results:
    """What there is to measure, when base and adapter have answered and drawn."""

    settings: ValidateParams
    eval_set: EvalSet
    cache: LatentCache
    adapter: Adapter
    evidence: ScoresAndSamples
    near: Neighbours
    vae: Vae
    feature_model: FeatureModel | None

    @property
    def samples(self) -> dict[str, list[Image.Image]]:
        """Ending of a metric's name -> the first picture of each prompt, of the base and of the adapter."""
        pictures = self.evidence.pictures
        return {"_base": pictures[0][0], "": pictures[max(pictures)][0]}


def measure(results: Results) -> dict[str, Value]:
    return {name: value for each in MEASURES for name, value in each(results).items()}


def ink(results: Results) -> dict[str, Value]:
    """Chroma (0 to 255) and dark share (0 to 1), mean over pictures; empty without ``validate.ink_measures``."""
    import numpy as np

    from lora_dag.pictures.measures import chroma, dark_share

    found: dict[str, Value] = {}
    for ending, pictures in results.samples.items() if results.settings.ink_measures else ():
        arrays = [np.asarray(picture) for picture in pictures]
        found[f"samples.chroma{ending}"] = bootstrap.mean(map(chroma, arrays))
        found[f"samples.dark_share{ending}"] = bootstrap.mean(map(dark_share, arrays))
    return found


def copies_and_diversity(results: Results) -> dict[str, Value]:
    return neighbours.metrics(results.near)


def drift(results: Results) -> dict[str, Value]:
    return results.evidence.drift


def arithmetic(results: Results) -> dict[str, Value]:
    return {"cost.tflop_per_image": cost.tflop_per_image(results.eval_set, results.adapter, results.cache)}


def fit_to_prompts_and_pictures(results: Results) -> dict[str, Value]:
    """By the feature model; empty without one."""
    if results.feature_model is None:
        return {}
    base, adapter = results.samples.values()
    return features.measure(
        results.feature_model, results.eval_set, results.settings.prompts, base, adapter, results.vae
    )


MEASURES: tuple[Callable[[Results], dict[str, Value]], ...] = (
    ink,
    copies_and_diversity,
    drift,
    arithmetic,
    fit_to_prompts_and_pictures,
)
