"""Nearest training images: distances against stock diffusers, and planted copies."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_dag.artifacts import metrics
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.artifacts.manifest import Manifest
from lora_dag.core import params
from lora_dag.core.params import ModelParams
from lora_dag.families import sd
from lora_dag.images.decode import load_view
from stages.report.page import verdict_sentences
from stages.validate import neighbors, score_snapshots
from stages.validate.heldout_loss import make_eval_set
from stages.validate.neighbors import FeatureSpace, Neighbors, Sample
from stages.validate.params import ValidateParams
from stages.validate.vae import Vae
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import refused
from tests.helpers.validated import write_adapter
from tests.helpers.workspace import REPOSITORY, Workspace

CPU = torch.device("cpu")


def noise(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def make_space(model: Any = None) -> FeatureSpace:
    config, cache = params.load(Path("params.yaml")), LatentCache(Path("data/latents"))
    eval_set = make_eval_set(config.section(ValidateParams), config.section(ModelParams), sd, cache, CPU)
    return FeatureSpace(eval_set, cache, Vae(eval_set), model)


def training_images() -> dict[str, Image.Image]:
    """Return the training images as prepare crops them."""
    manifest = Manifest.load(Path("data/prepared"))
    return {
        item.file_name: load_view(
            Path("data/raw", item.file_name).read_bytes(),
            item,
            manifest.augmentation.views(item, 1)[0],
            manifest.preprocessing,
        )
        for item in manifest.items
        if item.split == "train"
    }


def test_distances_equal_the_stock_vae(cached: Workspace) -> None:
    space, images = make_space(), noise(4)
    found = neighbors.find_neighbors(space, ["a", "b"], [images[:2]], [images[2:]])
    vae, trained = AutoencoderKL.from_pretrained("data/base/vae"), training_images()

    def latents(image: Image.Image) -> np.ndarray:
        pixels = torch.tensor(np.array(image) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            return (vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor).double().numpy()

    known = {name: latents(image) for name, image in trained.items()}
    for sample, image in zip(found.base + found.adapter, images, strict=True):
        own = latents(image)
        expected = {name: float(np.sqrt(np.mean((own - other) ** 2))) for name, other in known.items()}
        assert sample.nearest == min(expected, key=lambda name: expected[name])
        assert sample.distance == pytest.approx(expected[sample.nearest], rel=1e-4)
    assert [(sample.prompt, sample.index) for sample in found.base] == [("a", 0), ("b", 0)]
    assert found.num_views == len(trained) and len(found.heldout) == 8 - len(trained)


def test_only_images_of_the_samples_shape_are_compared_as_latents(workspace: Workspace) -> None:
    write_mixed_cache()
    space, images = make_space(), noise(2, (48, 16))
    views = {view for _, view in space.trained_views()}
    assert views == {"0a", "0b", "1a", "1b"}  # the wide ones that are trained on
    found = neighbors.find_neighbors(space, ["a"], [[images[0]]], [[images[1]]])
    assert found.adapter[0].view in views and len(found.heldout) == 3
    shown: list[tuple[int, int]] = []

    class Pixels:
        name = "pixels"

        def embed_images(self, given: Any) -> np.ndarray:
            shown.extend(image.size for image in given)
            return np.stack([np.asarray(image.resize((4, 4)), np.float32).ravel() for image in given])

    every = neighbors.find_neighbors(make_space(Pixels()), ["a"], [[images[0]]], [[images[1]]])
    assert every.num_views == 10 and {(48, 16), (16, 48), (32, 32)} == set(shown)  # none for regularization
    assert neighbors.distance_scale(every, make_space(Pixels()))["space"] == "pixels"


def samples(*distances: float) -> list[Sample]:
    return [Sample("a", index, noise(1)[0], value, "x.png", "x") for index, value in enumerate(distances)]


def test_copied_share_counts_samples_below_the_5_percent_quantile() -> None:
    heldout = np.arange(1, 101) / 100
    found = Neighbors(samples(0.5, 0.9), samples(0.0, 0.05, 0.07, 0.5), heldout, (1.0, 1.0), 9)
    assert found.threshold == pytest.approx(0.0505)  # between the 5th and the 6th of a hundred
    assert [found.copied_share(found.base), found.copied_share(found.adapter)] == [0, 0.5]
    neighbors.require_copied_share(found, limited(None), Path("reports"))
    neighbors.require_copied_share(found, limited(0.5), Path("reports"))
    place = "params.yaml validate.max_copied_share"
    with refused("too-many-copies", place, "0.4", "0.5 of the samples", "reports/nearest.png"):
        neighbors.require_copied_share(found, limited(0.4), Path("reports"))
    unknown = Neighbors(samples(0.5), samples(0.5), np.array([]), (1.0, 1.0), 9)
    assert neighbors.metrics(unknown)["samples.copied_share"] != 0
    with refused("copies-unknown", place, "0.4", "null"):
        neighbors.require_copied_share(unknown, limited(0.4), Path("reports"))


def limited(max_copied_share: float | None) -> ValidateParams:
    settings = params.load(REPOSITORY / "params.yaml").section(ValidateParams)
    return settings.model_copy(update={"max_copied_share": max_copied_share})


def test_far_share_counts_samples_above_the_95_percent_quantile() -> None:
    heldout = np.arange(1, 101) / 100
    found = Neighbors(samples(0.5, 0.9), samples(0.95, 0.96, 3.0, 0.5), heldout, (1.0, 1.0), 9)
    assert found.far_threshold == pytest.approx(0.9595)  # between the 95th and the 96th of a hundred
    assert [found.far_share(found.base), found.far_share(found.adapter)] == [0, 0.5]
    assert np.isnan(Neighbors(samples(0.5), samples(0.5), np.array([]), (1.0, 1.0), 9).far_share(samples(0.5)))


@pytest.mark.parametrize(
    ("pixels", "is_blank"),
    [
        (np.zeros((32, 32, 3)), True),
        (np.full((32, 32, 3), (200, 30, 90)), True),  # one color, but for some noise
        (np.full((32, 32, 3), 255) - np.eye(32)[..., None] * 200, False),  # a thin line on white
        (np.random.default_rng(0).integers(0, 30, (32, 32, 3)), False),  # dark noise: it is far instead
    ],
)
def test_blank_samples_have_one_color(pixels: np.ndarray, is_blank: bool) -> None:
    (sample,) = samples(1.0)
    pixels = np.clip(pixels + np.random.default_rng(1).normal(0, 1, pixels.shape), 0, 255)
    assert replace(sample, image=Image.fromarray(pixels.astype(np.uint8))).is_blank == is_blank


@pytest.mark.parametrize(("num_heldout", "share"), [(5, 1 / 6), (19, 0.05), (25, 0.05), (100, 0.05)])
def test_held_out_images_count_as_copied_at_the_stated_rate(num_heldout: int, share: float) -> None:
    """NumPy's own quantile: 0.19, 0.09, 0.08 and 0.06."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, num_heldout + 1))
    found = [drawn[0] < Neighbors([], [], drawn[1:], (1.0, 1.0), 9).threshold for drawn in draws]
    assert np.mean(found) == pytest.approx(share, abs=0.012)


def test_distance_is_nan_without_training_images() -> None:
    distances, nearest = neighbors.find_nearest(np.zeros((2, 3), np.float32), [])
    assert np.isnan(distances).all() and nearest.tolist() == [-1, -1]


def test_diversity_is_the_mean_over_pairs_and_prompts() -> None:
    points = np.array([[[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 2.0]]])
    assert neighbors.diversity(points) == pytest.approx((5 + 0 + 5 + 0 + 1 + 1) / 6)
    assert np.isnan(neighbors.diversity(points[:1]))


def test_planted_copies_fail_the_stage_and_the_base_does_not(
    cached: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter that draws training images, under a base that draws anything."""
    planted = training_images()
    names = sorted(planted)[:4]

    def draw(scorer: Any, sampling: Any) -> list[Image.Image]:
        unet, count = scorer.pipeline.unet, len(sampling.prompts)
        if any(getattr(module, "disable_adapters", None) is True for module in unet.modules()):
            return noise(count)
        return [planted[name] for name in names[count * sampling.index : count * (sampling.index + 1)]]

    monkeypatch.setattr(score_snapshots.SnapshotScorer, "draw", draw)
    write_adapter(0.3)
    with refused("too-many-copies", "--set validate.max_copied_share", "0.9", "1 of the samples"):
        cached.run("validate", "--set", "validate.max_copied_share=0.9")
    measured = metrics.load(Path("reports/metrics.json"))  # there to be looked at
    assert (measured["samples.copied_share"], measured["samples.copied_share_base"]) == (1, 0)
    assert measured["samples.nearest_distance"] < 1e-5 < measured["samples.nearest_distance_base"]  # type: ignore[operator]
    rows = list(csv.DictReader(io.StringIO(Path("reports/validate/nearest.csv").read_text())))
    assert [row["nearest"] for row in rows] == names
    assert {row["copied"] for row in rows} == {"1"} and {row["base_copied"] for row in rows} == {"0"}
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    assert Path("reports/validate/nearest.png").stat().st_size <= 300_000
    assert load_lineage(Path("reports/validate/lineage.json"))["neighbors"]["num_heldout"] == 8 - len(planted)


def test_report_qualifies_a_better_loss_of_a_broken_adapter(
    cached: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broken adapter draws black images, then noise; drift is checked apart from that."""
    known = list(training_images().values())

    def draw(scorer: Any, sampling: Any) -> list[Image.Image]:
        unet, count = scorer.pipeline.unet, len(sampling.prompts)
        if any(getattr(module, "disable_adapters", None) is True for module in unet.modules()):
            return [image.point(lambda value: value // 2 + 60) for image in known[:count]]
        return [Image.new("RGB", (32, 32))] * count if sampling.index == 0 else noise(count)

    monkeypatch.setattr(score_snapshots.SnapshotScorer, "draw", draw)
    write_adapter(30)
    cached.run("validate", "--set", "validate.num_seeds=4")
    measured = metrics.load(Path("reports/metrics.json"))
    assert (measured["samples.blank_share"], measured["samples.blank_share_base"]) == (0.25, 0)
    better = {"val.loss_change": -0.04, "val.loss_change_low": -0.045, "val.loss_change_high": -0.035}
    lineage = load_lineage(Path("reports/validate/lineage.json"))
    verdict, *sentences = verdict_sentences({**measured, **better}, lineage)
    assert "better than the base on these few images" in verdict
    assert any(
        "6 of 8 samples count as unlike any image of the dataset (2.67 by chance, base: 0;" in s for s in sentences
    )
    assert sentences[-1] == "2 of 8 samples count as blank (base: 0)."
