"""``lora-dag gc``: entries are deleted by last use or by size, and encoded again when needed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_dag.artifacts.store import Store
from tests.helpers.encodings import Calls, encode
from tests.helpers.errors import refused
from tests.helpers.workspace import Workspace

DAY = 86400


@pytest.fixture
def store(cached: Workspace, calls: Calls) -> Store:
    """Return a store with 8 images and 9 captions used 40 days ago, and 8 images of 40 pixels used 10 days ago."""
    made = Store()
    age(made, 40)
    size = ("--set", "dataset.resolution=40")
    for stage in ("prepare", "cache_latents"):
        cached.run(stage, *size)
    age(made, 10, younger_than=20)
    calls.take()
    return made


def age(store: Store, days: float, younger_than: float = 1000) -> None:
    """Set the last use of entries."""
    now = time.time()
    for _, path in store.entries():
        if now - path.stat().st_mtime < younger_than * DAY:
            os.utime(path, (now - days * DAY, now - days * DAY))


def names(store: Store) -> set[str]:
    return {path.name for _, path in store.entries()}


def num_bytes(store: Store) -> int:
    return sum(path.stat().st_size for _, path in store.entries())


def test_unused_entries_are_deleted_and_encoded_again_when_needed(
    cached: Workspace, store: Store, calls: Calls
) -> None:
    """Both runs used the captions; only the first run used the latents of 32 pixels."""
    before, latents = names(store), cached.tree("data/latents")
    assert len(before) == 8 + 8 + 9
    (line,) = cached.run("gc", "--older-than", "30d", "--dry-run")
    assert names(store) == before and line.startswith("would free ") and line.endswith(": 8 of 25 entries")
    total = num_bytes(store)
    (line,) = cached.run("gc", "--older-than", "30d")
    freed = total - num_bytes(store)
    assert line == f"freed {freed / 1e6:.1f} MB of {total / 1e6:.1f} MB: 8 of 25 entries"
    assert len(names(store)) == 17 and cached.tree("data/latents") == latents
    cached.run("prepare")
    assert cached.run("cache_latents")[-3] == "images      encoded 8, reused 0" and names(store) == before
    assert calls.take() == (8, 0)


def test_a_run_that_reuses_an_entry_keeps_it(cached: Workspace, store: Store) -> None:
    """data/prepared has 32 pixels again: its latents and the captions are used."""
    cached.run("prepare")
    assert cached.run("cache_latents")[-3] == "images      encoded 0, reused 8"
    assert cached.run("gc", "--older-than", "1d")[0].endswith(": 8 of 25 entries")
    assert cached.run("status")[0] == "8 images: 8 valid, 0 not valid"


def test_reused_masks_are_kept(masked: Workspace) -> None:
    encode(masked, "dataset.mask=masks")
    masks = {path for kind, path in Store().entries() if kind == "masks"}
    age(Store(), 40)
    encode(masked, "dataset.mask=masks")
    masked.run("gc", "--older-than", "30d")
    assert masks and all(path.exists() for path in masks)


def test_the_least_recently_used_entries_are_deleted_down_to_the_size(cached: Workspace, store: Store) -> None:
    old = {path.name for _, path in store.entries() if time.time() - path.stat().st_mtime > 20 * DAY}
    total, most = num_bytes(store), max(path.stat().st_size for _, path in store.entries())
    limit = (total - 1) / 1e6  # one entry is too much
    cached.run("gc", "--max-size", f"{limit:.6f}MB")
    assert total - most <= num_bytes(store) <= limit * 1e6
    cached.run("gc", "--max-size", f"{(total - 8 * most) / 1e6:.6f}MB")
    assert not names(store) & old
    assert cached.run("gc", "--max-size", "1GB")[0].startswith("freed 0.0 MB of ")


def test_both_limits_hold(cached: Workspace, store: Store) -> None:
    assert cached.run("gc", "--max-size", "1TB", "--older-than", "2w")[0].endswith(": 8 of 25 entries")
    assert cached.run("gc", "--max-size", "0MB", "--older-than", "1000d")[0].endswith(": 17 of 17 entries")


def test_leftovers_of_killed_writes_are_deleted_at_any_age(cached: Workspace, store: Store) -> None:
    leftover = next(iter(store.entries()))[1].with_name(".half.safetensors.tmp")
    leftover.write_bytes(b"x")
    assert cached.run("gc", "--older-than", "1000d")[0].endswith(": 1 of 26 entries") and not leftover.exists()


def test_while_a_run_is_at_work_nothing_is_deleted(cached: Workspace, store: Store) -> None:
    before = names(store)
    with store.in_use(), refused("store-in-use"):
        cached.run("gc", "--max-size", "0MB")
    assert names(store) == before


def test_gc_needs_a_limit(cached: Workspace, store: Store) -> None:
    with refused("gc-without-limit", "MB in 25 entries", "--older-than 30d", "--max-size 20GB"):
        cached.run("gc", "--dry-run")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("--older-than", "30"), ("'30'", "h, d, w", "30d")),
        (("--older-than", "\N{ARABIC-INDIC DIGIT THREE}d"), ("\N{ARABIC-INDIC DIGIT THREE}d", "30d")),
        (("--max-size", "20 GB"), ("'20 GB'", "MB, GB, TB", "20GB")),
    ],
)
def test_an_amount_without_its_unit_is_refused(
    workspace: Workspace, words: tuple[str, str], values: tuple[str, ...]
) -> None:
    with refused("wrong-arguments", words[0], *values):
        workspace.run("gc", *words)


def test_without_a_store_there_is_nothing_to_delete(workspace: Workspace) -> None:
    (line,) = workspace.run("gc", "--older-than", "1d")
    assert line.startswith(f"{Path('.state/store').resolve()}: ")
