"""The store, filled with what it lacks: in smaller batches where memory is short; damaged entries are made again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from lora_dag.artifacts.store import Kind
from lora_dag.core.console import UserError, log, plural
from lora_dag.core.took import Work
from stages.cache_latents.context import Context
from stages.cache_latents.encoding import Encoder, OutOfMemory, encode_all
from stages.cache_latents.keys import Setting


class Entries(Protocol):
    """One kind of entries that a manifest needs: latents, captions or masks."""

    kind: Kind
    context: Context

    @property
    def jobs(self) -> Mapping[str, Any]:
        """Key -> what is encoded under it."""

    def fill(self, keys: list[str]) -> None:
        """Make these, and put them into the store."""


class Encodings(Entries, Protocol):
    """Entries that a model encodes; it is loaded when one is missing."""

    unit: str
    setting: Setting
    encoded: set[str]

    @property
    def encoder(self) -> Encoder[Any]:
        """A cached property: the model is loaded at the first use."""

    def __init__(self, context: Context, setting: Setting) -> None: ...

    def units(self, key: str) -> int:
        """What the time to encode an entry is proportional to."""


E = TypeVar("E", bound=Encodings)


def complete(build: type[E], context: Context) -> E:
    """Encode what the store lacks; in smaller batches, then in tiles, where memory is short.

    The asked setting is tried first each time, so that a run does not depend on what happened in an earlier one. What
    an earlier one encoded at a smaller setting is found in the store: falling back costs the batches that do not fit.

    Raises:
        UserError: even one picture, in tiles, does not fit.
    """
    tried: list[Setting] = attempts(context.setting(build.kind), build.kind)
    for setting, smaller in zip(tried, [*tried[1:], None], strict=True):
        work = build(context, setting)
        missing = [key for key in work.jobs if not context.store.has(work.kind, key)]
        try:
            if missing:
                fill_timed(work, missing)
            return work
        except OutOfMemory:
            if smaller is None:
                raise nothing_fits(work.kind) from None
            log.warning("warning: %s", fallback(setting, smaller, work.kind))
    raise AssertionError("the last attempt returns or raises")


def attempts(asked: Setting, kind: Kind) -> list[Setting]:
    """What is tried in turn. All of it is part of every key: what was encoded otherwise never mixes with it."""
    found = [asked]
    while found[-1].batch_size > 1:
        found.append(replace(found[-1], batch_size=found[-1].batch_size // 2))
    if kind == "latents" and not asked.tiling:
        found.append(replace(found[-1], tiling=True))
    return found


def fill_timed(work: Encodings, keys: list[str]) -> None:
    """Encode these; say before what it will take, as far as it was measured here."""
    amount = sum(map(work.units, keys))
    known = Work(f"cache_latents-{work.kind}", work.context.speed(work.kind), amount)
    known.announce(what=f" for {plural(len(keys), work.unit)}")
    _ = work.encoder  # loading is no part of the rate
    start = time.monotonic()
    try:
        work.fill(keys)
    finally:
        del vars(work)["encoder"]  # frees its memory for what comes next
    if len(keys) > work.setting.batch_size:  # a single batch is mostly padding
        known.record(amount, time.monotonic() - start)


def encode_into_store(work: Encodings, encoder: Encoder[Any], keys: list[str]) -> None:
    context = work.context
    proofs = context.proofs(work.kind, work.setting)
    encode_all(encoder, keys, partial(context.save, work.kind), proofs)
    work.encoded |= set(keys)


def fallback(setting: Setting, smaller: Setting, kind: Kind) -> str:
    if smaller.tiling != setting.tiling:
        return (
            "a picture does not fit into memory; starting again in tiles; "
            "set cache.batch_size: 1 and cache.tiling: true to say so"
        )
    return (
        f"params.yaml cache.batch_size: {setting.batch_size} does not fit into memory; starting {kind} again with "
        f"{smaller.batch_size}; set cache.batch_size: {smaller.batch_size} to say so"
    )


def nothing_fits(kind: Kind) -> UserError:
    what = "one picture in tiles" if kind == "latents" else "one caption"
    return UserError(
        f"params.yaml cache.batch_size: even {what} does not fit into memory; free some of it, "
        "lower dataset.resolution, or use another runtime.device"
    )


def repair(work: Entries) -> None:
    """Make damaged entries again, all at once: a batch for each would be mostly padding.

    Raises:
        UserError: they do not fit into memory any more. They are deleted, so that the next run finds them missing and
            tries smaller batches for all.
    """
    store = work.context.store
    damaged = [key for key in work.jobs if store.load(work.kind, key) is None]
    for key in damaged:
        log.warning("warning: %s is damaged and is made again", store.path(work.kind, key))
    try:
        work.fill(damaged)
    except OutOfMemory:
        for key in damaged:
            store.path(work.kind, key).unlink(missing_ok=True)
        gone = plural(len(damaged), "damaged entry is", "damaged entries are")
        raise UserError(
            f"{store.root / work.kind}: {gone} deleted, since a batch to make them again "
            "does not fit into memory any more; run again: smaller batches are tried then"
        ) from None
