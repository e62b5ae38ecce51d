"""What a manifest asks the store for: views through the VAE, captions through the text encoders, and masks.

Each class knows its keys and how to fill the store with those that it lacks; a model is loaded when one is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lora_dag.artifacts.manifest import Item, View, natural_key
from lora_dag.artifacts.store import Kind
from lora_dag.core.console import UserError, log, plural
from lora_dag.core.progress import Bar
from lora_dag.core.took import Work
from lora_dag.pictures.decode import cut_view, decode
from lora_dag.pictures.masks import cut_mask, decode_mask
from stages.cache_latents.context import Context, mask_file, naming_changes, read_checked
from stages.cache_latents.encoding import NUM_READERS, Encoder, OutOfMemory, Recent, Shape, Tensors, encode_all
from stages.cache_latents.keys import Setting, caption_key, mask_key, picture_key

if TYPE_CHECKING:
    import torch
    from PIL import Image

NUM_MASKS = 256  # made and stored at a time


@dataclass(frozen=True)
class Job:
    """A view, and the picture that it is cut from."""

    item: Item
    view: View


class Views:
    """Posterior mean and std of every view."""

    kind: Kind = "latents"
    unit = "view"

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        self.decoded = Recent(self.decode, NUM_READERS)
        self.keys, self.jobs = plan(context, lambda item, view: picture_key(item, view, context.manifest, setting))

    def fill(self, keys: list[str]) -> None:
        """Encode these.

        Raises:
            UserError: a picture is not the one that prepare checked; all such pictures are named.
        """
        items = [self.jobs[key].item for key in keys]
        naming_changes(lambda: encode_into_store(self, self.encoder, keys), self.context, items)

    @cached_property
    def encoder(self) -> Encoder[torch.Tensor]:
        import torch

        model = self.context.model.model_copy(update={"dtype": self.setting.dtype})
        vae = self.context.family.load_vae(model, self.context.device, self.setting.tiling)

        def encode(pixel_values: list[torch.Tensor]) -> Tensors:
            mean, std = self.context.family.encode_images(vae, torch.stack(pixel_values))
            return {"mean": mean, "std": std}  # [B, C, H/f, W/f]

        size = self.setting.batch_size
        return Encoder(self.kind, self.read, encode, torch.zeros_like, self.shape, model, self.context.device, size)

    def read(self, key: str) -> torch.Tensor:
        """float32 [3, H, W] in [-1, 1]."""
        import torch

        item, view = self.jobs[key].item, self.jobs[key].view
        image = cut_view(self.decoded(item), item, view, self.context.manifest.preprocessing)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.read, item.file_name, item.sha256)
        return decode(blob, self.context.manifest.preprocessing)

    def shape(self, key: str) -> Shape:
        return self.jobs[key].item.width, self.jobs[key].item.height

    def conditioning(self, key: str) -> Tensors:
        """What the denoiser is told of the view beside its pixels. The key's own ingredients decide it: not stored."""
        job = self.jobs[key]
        return self.context.family.view_conditioning(*geometry(job.item, job.view))

    def units(self, key: str) -> int:
        return math.prod(self.shape(key))


def geometry(item: Item, view: View) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Original size, crop top left and target size, heights first, as SDXL's training counts them.

    The crop is counted in the picture after it was scaled and mirrored. Source: Podell et al. 2023
    (arXiv:2307.01952), algorithm 1; diffusers' train_text_to_image_lora_sdxl.py, ``crop_top_left``.
    """
    left, top, right, bottom = view.crop
    left = item.source_width - right if view.flip else left
    crop_top_left = round(top * item.height / (bottom - top)), round(left * item.width / (right - view.crop[0]))
    return (item.source_height, item.source_width), crop_top_left, (item.height, item.width)


class Captions:
    """Conditioning of every caption that can occur, the empty one included."""

    kind: Kind = "text"
    unit = "caption"

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        items = context.manifest.items
        captions = {"", *(caption for item in items for caption in (item.caption, *context.captions(item)))}
        self.keys = {caption: caption_key(caption, setting) for caption in sorted(captions)}
        self.jobs = {key: caption for caption, key in self.keys.items()}

    def fill(self, keys: list[str]) -> None:
        encode_into_store(self, self.encoder, keys)

    @cached_property
    def encoder(self) -> Encoder[str]:
        family, model, device = self.context.family, self.context.model, self.context.device
        text = family.load_text(model, device)

        def encode(captions: list[str]) -> Tensors:
            return family.encode_prompts(text, captions)

        def blank(caption: str) -> str:
            return ""

        size = self.setting.batch_size
        return Encoder(self.kind, self.jobs.__getitem__, encode, blank, self.shape, model, device, size)

    def shape(self, key: str) -> Shape:
        return ()  # tokenizers pad

    def units(self, key: str) -> int:
        return 1


class Masks:
    """Weight of each latent pixel's loss, for every view of a picture that has a mask. No model is asked."""

    kind: Kind = "masks"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.factor = context.family.vae_scale_factor(context.model)
        self.decoded = Recent(self.decode, NUM_READERS)
        self.keys, self.jobs = plan(
            context, lambda item, view: mask_key(item, view, context.manifest, self.factor) if item.mask else None
        )

    def fill(self, keys: list[str]) -> None:
        """Make these.

        Raises:
            UserError: a mask is not the one that prepare checked, or hides all of a view, so that no loss would be
                left; all such masks are named.
        """
        black: set[str] = set()
        naming_changes(lambda: self._make(keys, black), self.context, [self.jobs[key].item for key in keys])
        if black:
            raise UserError(*black_problems(self, black))

    def _make(self, keys: list[str], black: set[str]) -> None:
        """Store these, but for those that are zero all over, which are added to ``black``."""
        with ThreadPoolExecutor(NUM_READERS) as pool, Bar(self.kind, len(keys)) as bar:
            for start in range(0, len(keys), NUM_MASKS):
                some = keys[start : start + NUM_MASKS]
                for key, weights in zip(some, pool.map(self.read, some), strict=True):
                    if weights.any():
                        self.context.save(self.kind, key, {"mask": weights})
                    else:
                        black.add(key)
                bar.add(len(some))

    def read(self, key: str) -> torch.Tensor:
        """float32 [1, H/f, W/f]."""
        item, view = self.jobs[key].item, self.jobs[key].view
        mask = cut_mask(self.decoded(item), item, view)
        return mask_weights(mask, self.factor, self.context.manifest.unmasked_weight)

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.read, *mask_file(item))
        return decode_mask(blob, "alpha" if item.mask == "alpha" else "file")


def black_problems(masks: Masks, black: set[str]) -> list[str]:
    """One line per picture with a view whose mask is zero all over."""
    manifest = masks.context.manifest
    smaller_crop = "set dataset.crop to center, " if manifest.augmentation.crop == "random" else ""
    problems = []
    for item in manifest.items:
        keys = masks.keys[item.file_name]
        numbers = [str(number) for number, key in enumerate(keys, 1) if key in black]
        if numbers:
            views = f"view{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {len(keys)}"
            problems.append(
                f"{Path(manifest.source) / item.file_name}: its mask hides all of {views}, so no loss is left; "
                f"{smaller_crop}set dataset.unmasked_weight above 0, or mend the mask"
            )
    return problems


def mask_weights(mask: np.ndarray, factor: int, unmasked_weight: float) -> torch.Tensor:
    """[H, W] of 0 to 1 -> float32 [1, H/f, W/f] of unmasked_weight to 1: the mean over each latent pixel's area."""
    import torch

    height, width = mask.shape
    means = mask.astype(np.float64).reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))
    return torch.from_numpy(unmasked_weight + (1 - unmasked_weight) * means).float()[None]


def plan(
    context: Context, key_of: Callable[[Item, View], str | None]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Job]]:
    """File name -> key of each view, and key -> what it shows, in the order to read files in."""
    keys: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, Job] = {}
    for item in sorted(context.manifest.items, key=lambda item: natural_key(item.file_name)):
        pairs = [(key_of(item, view), view) for view in context.views(item)]
        named = [(key, view) for key, view in pairs if key is not None]
        keys[item.file_name] = tuple(key for key, _ in named)
        for key, view in named:
            jobs.setdefault(key, Job(item, view))
    return keys, jobs


# What is missing

W = TypeVar("W", Views, Captions)


def complete(build: type[W], context: Context) -> W:
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


def fill_timed(work: Views | Captions, keys: list[str]) -> None:
    """Encode these; say before what it will take, as far as it was measured here."""
    amount = sum(map(work.units, keys))
    known = Work(f"cache_latents-{work.kind}", work.context.speed(work.kind), amount)
    known.announce(what=f" for {plural(len(keys), work.unit)}")
    _ = work.encoder  # loading is no part of the rate
    start = time.monotonic()
    try:
        work.fill(keys)
    finally:
        del work.encoder  # frees its memory for what comes next
    if len(keys) > work.setting.batch_size:  # a single batch is mostly padding
        known.record(amount, time.monotonic() - start)


def encode_into_store(work: Views | Captions, encoder: Encoder[Any], keys: list[str]) -> None:
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


def repair(work: Views | Captions | Masks) -> None:
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
