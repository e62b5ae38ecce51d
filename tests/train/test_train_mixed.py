"""Trainings on several shapes, masks, captions, repeats and weights at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.core.files import read_json
from lora_dag.diffusion.objectives import VPrediction
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import assert_line, codes_of, refused
from tests.helpers.trainings import batches, history, squared_errors, weights
from tests.helpers.workspace import Workspace


def test_mixed_images_are_trained_and_told_about(mixed: Workspace) -> None:
    lines = mixed.run("train")
    assert "images      6 for training, 7 per epoch with repeats" in lines
    assert "buckets     latent sizes 12 x 4 (2), 8 x 8 (2), 4 x 12 (2)" in lines
    metrics = read_json(Path("reports/train/metrics.json"))
    assert metrics["train.num_images"] == 6 and metrics["train.epochs"] == pytest.approx(4 * 2 / 7, rel=1e-4)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights().values())


def test_buckets_smaller_than_a_batch_are_named_once(mixed: Workspace) -> None:
    lines = mixed.run("train", "--set", "train.batch_size=3")
    assert codes_of("\n".join(lines)) == ["bucket-small"] * 3
    for size in ("12 x 4", "8 x 8", "4 x 12"):
        assert_line("\n".join(lines), "bucket-small", f"bucket {size}", "2 images", "batches of 3")


def test_first_loss_of_mixed_images_equals_an_independent_computation(mixed: Workspace) -> None:
    """Micro-batches have masks, weights and different shapes."""
    mixed.run("train", "--set", "train.num_steps=2", "--set", "train.gradient_accumulation_steps=3")
    source = batches(LatentCache(Path("data/latents")), accumulation=3)
    losses, shapes, factors = [], set(), set()
    for micro in range(3):
        batch = source.batch(0, micro)
        assert batch.masks is not None
        for index in range(len(batch.timesteps)):
            errors = squared_errors(batch, index)
            mask = batch.masks[index].double().expand_as(errors)
            losses.append(float((errors * mask).sum() / mask.sum() * batch.weights[index]))
            shapes.add(tuple(errors.shape))
            factors.add((float(batch.weights[index]), bool(mask.eq(1).all())))
    assert len(shapes) > 1 and len(factors) > 1
    assert history()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_what_the_target_is_under_black_does_not_matter(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks are black in the upper half: two kinds of noise there give bit-identical adapters."""
    original = VPrediction.target

    def trained(garbage: float, **every: Any) -> dict[str, torch.Tensor]:
        def target(*args: Any) -> torch.Tensor:
            found = original(*args).clone()
            found[:, :, : found.shape[2] // 2] += garbage
            return found

        write_mixed_cache(**every)
        monkeypatch.setattr(VPrediction, "target", target)
        workspace.run("train")
        return weights()

    plain, loud, louder = (trained(garbage, masked=True) for garbage in (0.0, 7.0, -1e4))
    assert all(torch.equal(plain[name], loud[name]) and torch.equal(plain[name], louder[name]) for name in plain)
    seen, seen_loud = (trained(garbage, masked=False) for garbage in (0.0, 7.0))
    assert any(not torch.equal(seen[name], seen_loud[name]) for name in seen)


def test_a_weight_scales_the_loss(workspace: Workspace) -> None:
    losses = []
    for loss_weight in (1.0, 0.25):
        write_mixed_cache(loss_weight=loss_weight)
        workspace.run("train")
        losses.append(history()[0]["loss"])
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-4)


def test_repeats_count_towards_a_full_batch(mixed: Workspace) -> None:
    with refused("batch-too-large", "--set train.batch_size: got 8", "6 training images (7 with repeats)"):
        mixed.run("train", "--set", "train.batch_size=8")
    mixed.run("train", "--set", "train.batch_size=7", "--set", "train.num_steps=2")
