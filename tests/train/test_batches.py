"""Batches are functions of (seed, step, slot): full, of one shape, and fair to every image."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
from stages.train.batches import Batch, Batches, BatchOrder, Bucket, buckets_by_shape
from stages.train.noising import make_timesteps
from tests.helpers.caches import write_cache
from tests.helpers.settings import train_params

SHAPE = (4, 8, 8)
NUM_IMAGES = 6
EMPTY = -1.0


def make_cache(
    folder: Path,
    *,
    std: float = 0.0,
    num_views: int = 1,
    num_captions: int = 1,
    shapes: tuple[tuple[int, ...], ...] = (SHAPE,) * NUM_IMAGES,
    masked: tuple[int, ...] = (),
    changes: dict[int, dict[str, Any]] | None = None,
) -> LatentCache:
    """Image i has latents around i (each further view 0.1 more) and a prompt embedding of i (likewise per caption).

    The empty caption's embedding is -1. Masks are filled with 0.5 for the first view and 0.1 more for each further one.
    """
    means: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    embeds = {"": torch.full((3, 2), EMPTY)}
    items = []
    for index, shape in enumerate(shapes):
        views = {f"{index}.{view}": torch.full(shape, index + 0.1 * view) for view in range(num_views)}
        captions = {f"caption {index}.{n}": torch.full((3, 2), index + 0.1 * n) for n in range(num_captions)}
        if index in masked:
            masks |= {f"m{key}": torch.full((1, *shape[1:]), 0.5 + 0.1 * view) for view, key in enumerate(views)}
        first = next(iter(captions))
        item = CachedItem(f"{index}.png", "train", first, tuple(captions), f"content {index}", tuple(views))
        masks_of = tuple(f"m{key}" for key in views) if index in masked else ()
        items.append(dataclasses.replace(item, masks=masks_of, **(changes or {}).get(index, {})))
        means, embeds = means | views, embeds | captions
    return write_cache(folder, items, means, embeds, masks=masks, std=std)


def batches(cache: LatentCache, **changes: Any) -> Batches:
    """Return batches of 4 images without prompt dropout; ``changes`` are settings of section ``train``."""
    settings = train_params(
        *(f"{key}={value}" for key, value in ({"batch_size": 4, "prompt_dropout": 0.0} | changes).items())
    )
    timesteps = make_timesteps(settings, DDPMScheduler(1000))
    return Batches(cache, cache.split("train"), settings, timesteps, torch.device("cpu"))


def indices(batch: Batch) -> list[int]:
    """Return the numbers of the images, if std is 0."""
    return [round(value) for value in batch.latents[:, 0, 0, 0].tolist()]


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.latents, other.latents)
    assert torch.equal(one.noise, other.noise)
    assert torch.equal(one.timesteps, other.timesteps)
    assert one.prompt.keys() == other.prompt.keys()
    assert all(torch.equal(one.prompt[name], other.prompt[name]) for name in one.prompt)
    assert torch.equal(one.weights, other.weights)
    assert (one.masks is None) == (other.masks is None)
    assert one.masks is None or other.masks is None or torch.equal(one.masks, other.masks)


def test_shapes_and_types(tmp_path: Path) -> None:
    batch = batches(make_cache(tmp_path, std=1.0)).batch(0, 0)
    assert batch.latents.shape == batch.noise.shape == (4, *SHAPE)
    assert batch.latents.dtype == batch.noise.dtype == torch.float32
    assert batch.timesteps.shape == (4,) and batch.timesteps.dtype == torch.int64
    assert batch.prompt["prompt_embeds"].shape == (4, 3, 2)
    assert batch.weights.tolist() == [1] * 4 and batch.masks is None
    assert_same(batch.first(4), batch)
    assert torch.equal(batch.first(2).noise, batch.noise[:2]) and batch.first(2).prompt["prompt_embeds"].shape[0] == 2


def test_a_batch_is_a_function_of_seed_and_step_only(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=1.0, num_views=2)
    settings = {"gradient_accumulation_steps": 2, "prompt_dropout": 0.5}
    expected = batches(cache, **settings).batch(7, 1)

    other = batches(cache, **settings)
    for step in (9, 0, 7, 3):
        other.batch(step, 0)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_same(other.batch(7, 1), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seed", "step", "micro"), [(1, 7, 1), (0, 8, 1), (0, 7, 0)])
def test_seed_step_and_slot_change_the_draws(tmp_path: Path, seed: int, step: int, micro: int) -> None:
    cache = make_cache(tmp_path, std=1.0)
    expected = batches(cache, gradient_accumulation_steps=2).batch(7, 1)
    other = batches(cache, gradient_accumulation_steps=2, seed=seed).batch(step, micro)
    for name in ("latents", "noise", "timesteps"):
        assert not torch.equal(getattr(other, name), getattr(expected, name)), name


def test_every_epoch_visits_every_image_once_in_another_order(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path))  # 4 does not divide 6: batches cross the epochs' ends
    visited = [index for step in range(9) for index in indices(source.batch(step, 0))]
    epochs = [tuple(visited[start : start + NUM_IMAGES]) for start in range(0, 36, NUM_IMAGES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_IMAGES))] * 6
    assert len(set(epochs)) > 1


def test_accumulated_batches_draw_the_samples_of_one_large_batch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=1.0, num_views=2)
    for step in (0, 5):
        large = batches(cache, batch_size=8, prompt_dropout=0.5).batch(step, 0)
        for batch_size in (1, 2, 4):
            small = batches(
                cache, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size, prompt_dropout=0.5
            )
            parts = [small.batch(step, micro) for micro in range(8 // batch_size)]
            assert_same(Batch.cat(parts), large)


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.3, 1.0])
def test_prompt_dropout_is_the_fraction_of_empty_captions(tmp_path: Path, prompt_dropout: float) -> None:
    source = batches(make_cache(tmp_path), batch_size=1, prompt_dropout=prompt_dropout)
    drawn = [source.batch(step, 0) for step in range(300)]
    prompts = [batch.prompt["prompt_embeds"][0, 0, 0].item() for batch in drawn]
    kept = [(prompt, indices(batch)[0]) for prompt, batch in zip(prompts, drawn, strict=True) if prompt != EMPTY]
    assert all(prompt == index for prompt, index in kept)  # each image with its own caption
    share = 1 - len(kept) / 300
    assert share == prompt_dropout if prompt_dropout in (0, 1) else abs(share - prompt_dropout) < 0.1


def test_latents_are_drawn_from_the_posterior_with_separate_noise(tmp_path: Path) -> None:
    sharp, wide = (batches(make_cache(tmp_path / str(std), std=std)).batch(2, 0) for std in (0.0, 0.5))
    posterior_noise = (wide.latents - sharp.latents) / 0.5
    assert torch.equal(wide.noise, sharp.noise)
    assert abs(posterior_noise.mean()) < 0.1 and abs(posterior_noise.std() - 1) < 0.1
    together = torch.stack([posterior_noise.flatten(), wide.noise.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.1


def test_every_view_and_timestep_is_drawn(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path, num_views=2), timestep_range=[0.0, 0.003])
    drawn = [source.batch(step, 0) for step in range(30)]
    assert {t for batch in drawn for t in batch.timesteps.tolist()} == {0, 1, 2}
    values = {round(v, 1) for batch in drawn for v in batch.latents[:, 0, 0, 0].tolist()}
    assert values == {round(index + 0.1 * view, 1) for index in range(NUM_IMAGES) for view in range(2)}


def test_one_shape_keeps_the_order_and_draws_of_the_first_release(tmp_path: Path) -> None:
    """Values recorded before buckets existed: adapters in dvc.lock must stay bit-identical."""
    source = batches(make_cache(tmp_path / "sharp"), gradient_accumulation_steps=2)
    assert [[indices(source.batch(step, micro)) for micro in range(2)] for step in range(5)] == [
        [[1, 2, 0, 4], [3, 5, 5, 3]],
        [[2, 4, 0, 1], [0, 4, 2, 5]],
        [[1, 3, 5, 4], [0, 2, 3, 1]],
        [[2, 4, 3, 1], [5, 0, 5, 3]],
        [[1, 2, 0, 4], [0, 2, 3, 4]],
    ]
    assert indices(source.batch(10**6, 1)) == [3, 0, 4, 1]

    wide = make_cache(tmp_path / "wide", std=1.0, num_views=2)
    batch = batches(wide, gradient_accumulation_steps=2, prompt_dropout=0.5).batch(7, 1)
    assert batch.timesteps.tolist() == [490, 362, 896, 825]
    assert batch.prompt["prompt_embeds"][:, 0, 0].tolist() == [5, 4, EMPTY, EMPTY]
    assert batch.latents[:, 0, 0, 0].tolist() == pytest.approx([6.0288, 5.2872, -0.0668, 2.0052], abs=1e-4)
    assert batch.noise[:, 0, 0, 0].tolist() == pytest.approx([0.6484, 0.3698, 1.1176, 1.0856], abs=1e-4)


# Buckets

WIDE, TALL, ODD = (4, 4, 12), (4, 12, 4), (4, 6, 10)
MIXED = (WIDE, TALL, WIDE, ODD, WIDE, TALL, WIDE, WIDE)


def order(repeats: list[list[int]], batch_size: int, seed: int = 0) -> BatchOrder:
    """``order([[1, 1], [3]], 4)`` has a bucket of two images and one of an image that repeats three times."""
    buckets = []
    for index, bucket in enumerate(repeats):
        items = [
            CachedItem(f"{index}-{number}", "train", "", ("",), "", ("",), repeats=count)
            for number, count in enumerate(bucket)
        ]
        buckets.append(Bucket(8, 8 + index, items))
    return BatchOrder(buckets, batch_size, seed)


def names(source: BatchOrder, numbers: range) -> list[list[str]]:
    return [[item.file_name for item in source.items(number)] for number in numbers]


def test_buckets_are_found_without_reading_a_latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading latents would copy a whole half-precision cache to float32."""
    cache = make_cache(tmp_path, shapes=((4, 8, 8), (4, 4, 12), (4, 8, 8)))
    monkeypatch.setattr(LatentCache, "latents", None)
    found = [(bucket.height, bucket.width, len(bucket.items)) for bucket in buckets_by_shape(cache, cache.items)]
    assert found == [(4, 12, 1), (8, 8, 2)]


def test_batches_of_mixed_shapes_are_full_and_of_one_shape(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path, std=1.0, shapes=MIXED), batch_size=3, gradient_accumulation_steps=2)
    shapes = Counter()
    for step, micro in itertools.product(range(24), range(2)):
        batch = source.batch(step, micro)
        shapes[tuple(batch.latents.shape)] += 1
        assert batch.noise.shape == batch.latents.shape and len(batch.timesteps) == len(batch.weights) == 3
    assert shapes == {(3, *WIDE): 48 * 5 // 8, (3, *TALL): 48 * 2 // 8, (3, *ODD): 48 // 8}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("repeats", [[[1, 1, 1]], [[1] * 10, [1]], [[1, 3], [2] * 5, [1], [7]]], ids=str)
def test_every_image_is_used_as_often_as_its_repeats(repeats: list[list[int]], batch_size: int) -> None:
    """``batch_size`` cycles are exactly ``batch_size`` epochs of every bucket."""
    source = order(repeats, batch_size)
    drawn = names(source, range(sum(map(sum, repeats))))
    assert all(len(batch) == batch_size for batch in drawn)
    expected = {f"{b}-{i}": count * batch_size for b, bucket in enumerate(repeats) for i, count in enumerate(bucket)}
    assert Counter(itertools.chain(*drawn)) == expected


def test_every_cycle_has_each_bucket_in_proportion() -> None:
    source = order([[1] * 11, [1] * 6, [2]], 4)
    turns = [source.bucket_turn(number)[0] for number in range(19 * 5)]
    for cycle in range(20):
        seen = Counter(turns[: sum(source.num_before(cycle))])
        for bucket, entries in enumerate((11, 6, 2)):
            assert seen[bucket] == entries * cycle // 4
    cycles = [tuple(turns[sum(source.num_before(c)) : sum(source.num_before(c + 1))]) for c in range(20)]
    assert any(list(turn) != sorted(turn) for turn in cycles)
    assert len({turn for turn in cycles if Counter(turn) == Counter(cycles[1])}) > 1


def test_each_bucket_goes_through_its_own_epochs() -> None:
    """The images of a bucket form one permutation after another, different from the other bucket's."""
    source = order([[1] * 6, [1] * 6], 4)
    streams: list[list[str]] = [[], []]
    for number in range(36):
        batch = [item.file_name for item in source.items(number)]
        streams[int(batch[0][0])] += [name[2:] for name in batch]
    epochs = [[tuple(stream[start : start + 6]) for start in range(0, 72, 6)] for stream in streams]
    assert all(sorted(epoch) == list("012345") for stream in epochs for epoch in stream)
    assert len(set(epochs[0])) > 1 and not any(one == other for one, other in zip(*epochs, strict=True))


def test_bucket_turn_of_a_high_number_needs_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = [[1] * 11, [1] * 6, [2], [1]]
    source = order(repeats, 8)
    scanned: list[tuple[int, int]] = []
    had = Counter[int]()
    for number in range(300):
        bucket = source.bucket_turn(number)[0]
        scanned.append((bucket, had[bucket]))
        had[bucket] += 1
    assert [order(repeats, 8).bucket_turn(number) for number in reversed(range(300))] == scanned[::-1]

    calls, original = [], BatchOrder.num_before
    monkeypatch.setattr(BatchOrder, "num_before", lambda self, cycle: calls.append(cycle) or original(self, cycle))
    bucket, rank = source.bucket_turn(10**9)
    assert len(calls) < 50
    assert rank == pytest.approx(10**9 * sum(repeats[bucket]) / 20, rel=1e-6)


@pytest.mark.parametrize("num_buckets", [1, 40])
def test_buckets_smaller_than_a_batch_are_filled_with_repetitions(num_buckets: int) -> None:
    source = order([[1]] * num_buckets, 5)
    drawn = names(source, range(num_buckets * 3))
    assert all(len(batch) == 5 and len(set(batch)) == 1 for batch in drawn)
    assert set(Counter(batch[0] for batch in drawn).values()) == {3}


def test_seed_changes_the_order_of_buckets_and_images() -> None:
    repeats = [[1] * 9, [1] * 7]
    one, same, other = (names(order(repeats, 2, seed), range(40)) for seed in (0, 0, 1))
    assert one == same != other
    assert [batch[0][0] for batch in one] != [batch[0][0] for batch in other]


@pytest.mark.parametrize("start", [1, 7, 30])
def test_mixed_batches_are_a_function_of_the_step(tmp_path: Path, start: int) -> None:
    cache = make_cache(tmp_path, std=1.0, num_views=2, num_captions=3, shapes=MIXED, masked=(1, 2))
    settings = {"batch_size": 3, "gradient_accumulation_steps": 2, "prompt_dropout": 0.3}
    through, resumed = batches(cache, **settings), batches(cache, **settings)
    undisturbed = [through.batch(step, micro) for step in range(start + 2) for micro in range(2)]
    for step, micro in ((start, 0), (start + 1, 1), (start, 1), (start + 1, 0)):
        assert_same(resumed.batch(step, micro), undisturbed[2 * step + micro])


# Captions, masks, weights


def test_every_caption_is_drawn_about_equally_often_and_from_its_own_image(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path, num_captions=3), prompt_dropout=0.2)
    counts = Counter[int]()
    for step in range(300):
        batch = source.batch(step, 0)
        for index, value in zip(indices(batch), batch.prompt["prompt_embeds"][:, 0, 0].tolist(), strict=True):
            if value != EMPTY:
                counts[round((value - index) * 10)] += 1
    total = sum(counts.values())
    assert set(counts) == {0, 1, 2} and total == pytest.approx(0.8 * 1200, rel=0.1)
    assert all(count / total == pytest.approx(1 / 3, abs=0.06) for count in counts.values())


def test_captions_of_a_batch_belong_to_its_embeddings(tmp_path: Path) -> None:
    """Trained text encoders encode the same captions as the cache."""
    source = batches(make_cache(tmp_path, num_captions=3), prompt_dropout=0.5)
    seen = set()
    for batch in (source.batch(step, 0) for step in range(30)):
        for caption, row in zip(batch.captions, batch.prompt["prompt_embeds"], strict=True):
            assert torch.equal(row, source.cache.prompt(caption)["prompt_embeds"])
        assert batch.first(3).captions == batch.captions[:3]
        seen |= set(batch.captions)
    assert len(seen) == 1 + 3 * NUM_IMAGES and "" in seen


def test_more_captions_change_only_the_caption(tmp_path: Path) -> None:
    one, many = (
        batches(make_cache(tmp_path / str(count), std=1.0, num_views=2, num_captions=count)).batch(5, 0)
        for count in (1, 4)
    )
    assert not torch.equal(many.prompt["prompt_embeds"], one.prompt["prompt_embeds"])
    assert_same(dataclasses.replace(many, prompt=one.prompt), one)
    again = batches(make_cache(tmp_path / "again", std=1.0, num_views=2, num_captions=4)).batch(5, 0)
    assert_same(again, many)


def test_a_mask_belongs_to_its_view_and_other_images_have_no_mask(tmp_path: Path) -> None:
    source = batches(make_cache(tmp_path, num_views=3, masked=(0, 2, 5)))
    seen = set()
    for step in range(30):
        batch = source.batch(step, 0)
        assert batch.masks is not None and batch.masks.shape == (4, 1, *SHAPE[1:]) and batch.first(3).masks is not None
        for latents, mask in zip(batch.latents[:, 0, 0, 0].tolist(), batch.masks, strict=True):
            index, view = int(latents + 0.05), round(latents % 1 * 10) % 10
            expected = 0.5 + 0.1 * view if index in (0, 2, 5) else 1.0
            torch.testing.assert_close(mask, torch.full_like(mask, expected))
            seen.add((index, view))
    assert len(seen) == 3 * NUM_IMAGES


def test_masks_change_no_draw(tmp_path: Path) -> None:
    plain, masked = (
        batches(make_cache(tmp_path / str(len(which)), std=1.0, masked=which)).batch(3, 0) for which in ((), (1,))
    )
    assert plain.masks is None
    assert_same(dataclasses.replace(masked, masks=None), plain)


def test_each_image_has_its_loss_weight(tmp_path: Path) -> None:
    changes = {1: {"loss_weight": 0.25, "regularization": True}, 4: {"loss_weight": 2.0}}
    source = batches(make_cache(tmp_path, changes=changes))
    seen = set()
    for step in range(6):
        batch = source.batch(step, 0)
        assert batch.weights.dtype == torch.float32
        seen |= set(zip(indices(batch), batch.weights.tolist(), strict=True))
    assert seen == {(0, 1.0), (1, 0.25), (2, 1.0), (3, 1.0), (4, 2.0), (5, 1.0)}
