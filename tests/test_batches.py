from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts import latent_cache
from stages.artifacts.latent_cache import CachedItem, LatentCache
from stages.core.batches import Batch, Batches

SHAPE = (4, 8, 8)
NUM_PICTURES = 6
EMPTY = -1.0


def make_cache(folder: Path, *, std: float = 0.0, num_views: int = 1) -> LatentCache:
    """Picture i has latents around i (each further view 0.1 more) and a prompt embedding of i; the empty one is -1."""
    means: dict[str, torch.Tensor] = {}
    items = []
    for index in range(NUM_PICTURES):
        views = tuple(f"{index}{view}" for view in range(num_views))
        means |= {key: torch.full(SHAPE, index + 0.1 * view) for view, key in enumerate(views)}
        items.append(CachedItem(f"{index}.png", "train", f"caption {index}", f"content {index}", views))
    captions = {f"caption {index}": f"c{index}" for index in range(NUM_PICTURES)} | {"": "ce"}
    embeds = {key: EMPTY if key == "ce" else float(key[1:]) for key in captions.values()}

    def load(kind: str, key: str) -> dict[str, torch.Tensor]:
        if kind == "images":
            return {"mean": means[key], "std": torch.full(SHAPE, std)}
        return {"prompt_embeds": torch.full((3, 2), embeds[key])}

    latent_cache.write(folder, items, captions, {}, ["prompt_embeds"], load)
    return LatentCache(folder)


def batches(cache: LatentCache, **changes: Any) -> Batches:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "accumulation": 1,
        "prompt_dropout": 0.0,
        "num_train_timesteps": 1000,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return Batches(cache, cache.split("train"), **settings | changes)


def indices(batch: Batch) -> list[int]:
    """Which pictures, where std is 0."""
    return [round(value) for value in batch.latents[:, 0, 0, 0].tolist()]


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.noise, other.noise)
    assert torch.equal(one.timesteps, other.timesteps)
    assert one.prompt.keys() == other.prompt.keys()
    assert all(torch.equal(one.prompt[name], other.prompt[name]) for name in one.prompt)


def test_shapes_and_types(tmp_path: Path) -> None:
    batch = batches(make_cache(tmp_path, std=1.0)).batch(0, 0)
    assert batch.latents.shape == batch.noise.shape == (4, *SHAPE)
    assert batch.latents.dtype == batch.noise.dtype == torch.float32
    assert batch.timesteps.shape == (4,) and batch.timesteps.dtype == torch.int64
    assert batch.prompt["prompt_embeds"].shape == (4, 3, 2)
    assert_same(batch.first(4), batch)
    assert torch.equal(batch.first(2).noise, batch.noise[:2]) and batch.first(2).prompt["prompt_embeds"].shape[0] == 2


def test_a_batch_is_a_function_of_seed_and_step_whatever_was_drawn_before(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=1.0, num_views=2)
    settings = {"accumulation": 2, "prompt_dropout": 0.5}
    expected = batches(cache, **settings).batch(7, 1)

    other = batches(cache, **settings)
    for step in (9, 0, 7, 3):
        other.batch(step, 0)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_same(other.batch(7, 1), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seed", "step", "micro"), [(1, 7, 1), (0, 8, 1), (0, 7, 0)])
def test_seed_step_and_slot_all_matter(tmp_path: Path, seed: int, step: int, micro: int) -> None:
    cache = make_cache(tmp_path, std=1.0)
    expected = batches(cache, accumulation=2).batch(7, 1)
    other = batches(cache, accumulation=2, seed=seed).batch(step, micro)
    for name in ("latents", "noise", "timesteps"):
        assert not torch.equal(getattr(other, name), getattr(expected, name)), name


def test_every_epoch_visits_every_picture_once_in_another_order(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path))  # 4 does not divide 6: batches cross the epochs' ends
    visited = [index for step in range(9) for index in indices(source.batch(step, 0))]
    epochs = [tuple(visited[start : start + NUM_PICTURES]) for start in range(0, 36, NUM_PICTURES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_PICTURES))] * 6
    assert len(set(epochs)) > 1


def test_accumulated_batches_draw_the_samples_of_one_large_batch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=1.0, num_views=2)
    for step in (0, 5):
        large = batches(cache, batch_size=8, prompt_dropout=0.5).batch(step, 0)
        for batch_size in (1, 2, 4):
            small = batches(cache, batch_size=batch_size, accumulation=8 // batch_size, prompt_dropout=0.5)
            parts = [small.batch(step, micro) for micro in range(8 // batch_size)]
            joined = Batch(
                torch.cat([part.latents for part in parts]),
                torch.cat([part.noise for part in parts]),
                torch.cat([part.timesteps for part in parts]),
                {"prompt_embeds": torch.cat([part.prompt["prompt_embeds"] for part in parts])},
            )
            assert_same(joined, large)


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.3, 1.0])
def test_prompt_dropout_is_the_share_of_empty_captions(tmp_path: Path, prompt_dropout: float) -> None:
    source = batches(make_cache(tmp_path), batch_size=1, prompt_dropout=prompt_dropout)
    drawn = [source.batch(step, 0) for step in range(300)]
    prompts = [batch.prompt["prompt_embeds"][0, 0, 0].item() for batch in drawn]
    kept = [(prompt, indices(batch)[0]) for prompt, batch in zip(prompts, drawn, strict=True) if prompt != EMPTY]
    assert all(prompt == index for prompt, index in kept)  # each picture with its own caption
    share = 1 - len(kept) / 300
    assert share == prompt_dropout if prompt_dropout in (0, 1) else abs(share - prompt_dropout) < 0.1


def test_latents_are_drawn_from_the_posterior_with_noise_of_their_own(tmp_path: Path) -> None:
    sharp, wide = (batches(make_cache(tmp_path / str(std), std=std)).batch(2, 0) for std in (0.0, 0.5))
    posterior_noise = (wide.latents - sharp.latents) / 0.5
    assert torch.equal(wide.noise, sharp.noise)
    assert abs(posterior_noise.mean()) < 0.1 and abs(posterior_noise.std() - 1) < 0.1
    together = torch.stack([posterior_noise.flatten(), wide.noise.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.1


def test_every_view_and_timestep_is_drawn(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path, num_views=2), num_train_timesteps=3)
    drawn = [source.batch(step, 0) for step in range(30)]
    assert {t for batch in drawn for t in batch.timesteps.tolist()} == {0, 1, 2}
    values = {round(v, 1) for batch in drawn for v in batch.latents[:, 0, 0, 0].tolist()}
    assert values == {round(index + 0.1 * view, 1) for index in range(NUM_PICTURES) for view in range(2)}
