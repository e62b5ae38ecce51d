"""Encodes the entries that the store lacks, in smaller batches where memory is short, and damaged entries again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from lora_dag.artifacts.store import Kind
from lora_dag.core.console import Problem, UserError, plural, warn
from lora_dag.core.time_estimate import Work
from stages.cache_latents.context import Context
from stages.cache_latents.encoding import Encoder, OutOfMemory, Tensors, encode_all
from stages.cache_latents.keys import Setting
from stages.cache_latents.params import CacheParams


class EntryMaker(Protocol):
    """Maker of one kind of entries that a manifest needs: latents, captions or masks."""

    kind: Kind
    context: Context

    @property
    def jobs(self) -> Mapping[str, Any]:
        """Key -> the view or caption to encode."""

    def fill(self, keys: list[str]) -> None:
        """Make the entries of these keys and put them into the store."""


class EntryEncoder(EntryMaker, Protocol):
    """Maker of entries with a model, which is loaded only if an entry is missing."""

    unit: str
    setting: Setting
    encoded: set[str]

    @property
    def encoder(self) -> Encoder[Any]:
        """Encoder with its model; a cached property that loads the model at the first use."""

    def __init__(self, context: Context, setting: Setting) -> None: ...

    def save(self, key: str, tensors: Tensors) -> None:
        """Put an encoded entry into the store."""

    def reuse(self, keys: list[str]) -> list[str]:
        """Make missing entries from those of an earlier version, and return the keys that are still missing."""

    def units(self, key: str) -> int:
        """Return the amount that the time to encode an entry is proportional to."""


E = TypeVar("E", bound=EntryEncoder)


def encode_missing(build: type[E], context: Context) -> E:
    """Encode the entries that the store lacks, in smaller batches and then in tiles where memory is short.

    Each run tries the setting of params.yaml first, so that it does not depend on earlier runs. Entries that an earlier
    run encoded with a smaller setting are in the store: falling back again costs only the batch that does not fit.

    Raises:
        UserError: even one image in tiles does not fit.
    """
    settings = settings_to_try(context.requested_setting(build.kind), build.kind)
    for setting, smaller in zip(settings, [*settings[1:], None], strict=True):
        work = build(context, setting)
        missing = work.reuse([key for key in work.jobs if not context.store.has(work.kind, key)])
        try:
            if missing:
                fill_timed(work, missing)
            return work
        except OutOfMemory:
            if smaller is None:
                raise out_of_memory_error(context.cache, work.kind) from None
            problem = fallback_problem(context.cache, setting, smaller, work.kind)
            warn(problem.code, problem)
    raise AssertionError("the last attempt returns or raises")


def settings_to_try(requested: Setting, kind: Kind) -> list[Setting]:
    """Return the requested setting and smaller ones, in order. Keys contain the setting, so entries never mix."""
    settings = [requested]
    while settings[-1].batch_size > 1:
        settings.append(replace(settings[-1], batch_size=settings[-1].batch_size // 2))
    if kind == "latents" and not requested.tiling:
        settings.append(replace(settings[-1], tiling=True))
    return settings


def fill_timed(work: EntryEncoder, keys: list[str]) -> None:
    """Encode these keys, after a log line with the expected time if an earlier run measured it."""
    amount = sum(map(work.units, keys))
    known = Work(f"cache_latents-{work.kind}", work.context.speed_conditions(work.kind), amount)
    known.announce(what=f" for {plural(len(keys), work.unit)}")
    _ = work.encoder  # loading does not count in the measured time
    start = time.monotonic()
    try:
        work.fill(keys)
    finally:
        del vars(work)["encoder"]  # frees the model's memory
    if len(keys) > work.setting.batch_size:  # a single batch is mostly padding
        known.record(amount, time.monotonic() - start)


def encode_into_store(work: EntryEncoder, encoder: Encoder[Any], keys: list[str]) -> None:
    encode_all(encoder, keys, work.save, work.context.verified_shapes(work.kind, work.setting))
    work.encoded |= set(keys)


def fallback_problem(cache: CacheParams, setting: Setting, smaller: Setting, kind: Kind) -> Problem:
    """Return the warning that ``setting`` does not fit into memory and ``smaller`` is tried next."""
    if smaller.tiling != setting.tiling:
        return Problem(
            "encoder-fallback",
            f"{cache.setting('tiling')}: an image does not fit into memory, so {kind} start again in tiles. "
            "Set cache.batch_size: 1 and cache.tiling: true to start with that.",
        )
    return Problem(
        "encoder-fallback",
        f"{cache.setting('batch_size')}: {setting.batch_size} does not fit into memory, so {kind} start again with "
        f"{smaller.batch_size}. Set cache.batch_size: {smaller.batch_size} to start with that.",
    )


def out_of_memory_error(cache: CacheParams, kind: Kind) -> UserError:
    smallest = "one image in tiles" if kind == "latents" else "one caption"
    return UserError(
        Problem(
            "out-of-memory",
            f"{cache.setting('batch_size')}: even {smallest} does not fit into memory. "
            "Free some memory, lower dataset.resolution, or set another runtime.device.",
        )
    )


def remake_damaged(work: EntryMaker) -> None:
    """Make all damaged entries again at once: a batch for each would be mostly padding.

    Raises:
        UserError: a batch does not fit into memory any more. The damaged entries are deleted, so that the next run
            tries smaller batches for all entries.
    """
    store = work.context.store
    damaged = [key for key in work.jobs if store.load(work.kind, key) is None]
    for key in damaged:
        warn("store-entry-damaged", f"{store.path(work.kind, key)}: damaged. It is made again.")
    try:
        work.fill(damaged)
    except OutOfMemory:
        for key in damaged:
            store.path(work.kind, key).unlink(missing_ok=True)
        entries = plural(len(damaged), "damaged entry was", "damaged entries were")
        raise UserError(
            Problem(
                "out-of-memory",
                f"{store.root / work.kind}: {entries} deleted, because a batch to make them again does not fit into "
                "memory. Run the same command again: it tries smaller batches.",
            )
        ) from None
