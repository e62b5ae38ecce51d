"""What a manifest asks the store for: views through the VAE, captions through the text encoders, and masks.

Each class knows its keys and how to fill the store with those that it lacks; a model is loaded when one is missing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stages.artifacts.manifest import Item, View
from stages.artifacts.store import Kind
from stages.cache_latents.context import Context, mask_file, naming_changes, read_checked
from stages.cache_latents.encoding import NUM_READERS, Encoder, OutOfMemory, Recent, Tensors, encode_all, progress
from stages.cache_latents.keys import Setting, caption_key, mask_key, picture_key
from stages.core.console import UserError, log
from stages.core.pictures import cut_view, decode, load_mask

if TYPE_CHECKING:
    import torch
    from PIL import Image

NUM_MASKS = 256  # made and stored at a time


@dataclass(frozen=True)
class Job:
    """A view, and the picture that it is cut from."""

    item: Item
    view: View


@dataclass(frozen=True)
class Effort:
    """What encoding took, for the estimate of ``--status``."""

    units: int
    """Pixels of views, or captions."""
    seconds: float
    bytes: int
    num_batches: int


class Views:
    """Posterior mean and std of every view."""

    kind: Kind = "latents"

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        self.effort: Effort | None = None
        self.decoded = Recent(self.decode, NUM_READERS)
        self.keys, self.jobs = plan(context, lambda item, view: picture_key(item, view, context.manifest, setting))

    def fill(self, keys: list[str]) -> None:
        """Encode these.

        Raises:
            UserError: a picture is not the one that prepare checked; all such pictures are named.
        """
        by_size = defaultdict(list)
        for key in keys:
            item = self.jobs[key].item
            by_size[item.width, item.height].append(key)
        groups, every = list(by_size.values()), self.context.log_every_n_steps
        naming_changes(
            lambda: encode_all(self.encoder, groups, self.context.store, every),
            self.context,
            [self.jobs[key].item for key in keys],
        )
        self.encoded |= set(keys)

    @cached_property
    def encoder(self) -> Encoder[torch.Tensor]:
        import torch

        model = self.context.model.model_copy(update={"dtype": self.setting.dtype})
        vae = self.context.family.load_vae(model, self.context.device, self.setting.tiling)

        def encode(pixel_values: list[torch.Tensor]) -> Tensors:
            mean, std = self.context.family.encode_images(vae, torch.stack(pixel_values))
            return {"mean": mean, "std": std}  # [B, C, H/f, W/f]

        size = self.setting.batch_size
        return Encoder(self.kind, self.read, encode, torch.zeros_like, model, self.context.device, size)

    def read(self, key: str) -> torch.Tensor:
        """float32 [3, H, W] in [-1, 1]."""
        import torch

        item, view = self.jobs[key].item, self.jobs[key].view
        image = cut_view(self.decoded(item), item, view, self.context.manifest.preprocessing)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def decode(self, item: Item) -> Image.Image:
        blob = read_checked(self.context.files, item.file_name, item.sha256)
        return decode(blob, self.context.manifest.preprocessing)

    def conditioning(self, key: str) -> Tensors:
        """What the denoiser is told of the view beside its pixels. The key's own ingredients decide it: not stored."""
        job = self.jobs[key]
        return self.context.family.view_conditioning(*geometry(job.item, job.view))

    def units(self, key: str) -> int:
        item = self.jobs[key].item
        return item.width * item.height


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

    def __init__(self, context: Context, setting: Setting) -> None:
        self.context, self.setting = context, setting
        self.encoded: set[str] = set()
        self.effort: Effort | None = None
        items = context.manifest.items
        captions = {"", *(caption for item in items for caption in (item.caption, *context.captions(item)))}
        self.keys = {caption: caption_key(caption, setting) for caption in sorted(captions)}
        self.jobs = {key: caption for caption, key in self.keys.items()}

    def fill(self, keys: list[str]) -> None:
        encode_all(self.encoder, [keys], self.context.store, self.context.log_every_n_steps)
        self.encoded |= set(keys)

    @cached_property
    def encoder(self) -> Encoder[str]:
        family, model, device = self.context.family, self.context.model, self.context.device
        text = family.load_text(model, device)

        def encode(captions: list[str]) -> Tensors:
            return family.encode_prompts(text, captions)

        def blank(caption: str) -> str:
            return ""

        return Encoder(self.kind, self.jobs.__getitem__, encode, blank, model, device, self.setting.batch_size)

    def units(self, key: str) -> int:
        return 1


class Masks:
    """Weight of each latent pixel's loss, for every view of a picture that has a mask. No model is asked."""

    kind: Kind = "masks"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.factor = context.family.vae_scale_factor(context.model)
        self.keys, self.jobs = plan(
            context, lambda item, view: mask_key(item, view, context.manifest, self.factor) if item.mask else None
        )

    def fill(self, keys: list[str]) -> None:
        """Make these.

        Raises:
            UserError: a mask is not the one that prepare checked; all such masks are named.
        """
        naming_changes(lambda: self._make(keys), self.context, [self.jobs[key].item for key in keys])

    def _make(self, keys: list[str]) -> None:
        every = self.context.log_every_n_steps
        with ThreadPoolExecutor(NUM_READERS) as pool, progress(self.kind, len(keys), every) as advance:
            for start in range(0, len(keys), NUM_MASKS):
                some = keys[start : start + NUM_MASKS]
                for key, weights in zip(some, pool.map(self.read, some), strict=True):
                    self.context.store.save(self.kind, key, {"mask": weights})
                advance(len(some))

    def read(self, key: str) -> torch.Tensor:
        """float32 [1, H/f, W/f]."""
        item, view = self.jobs[key].item, self.jobs[key].view
        manifest = self.context.manifest
        blob = read_checked(self.context.files, *mask_file(item))
        mask = load_mask(blob, item, view, manifest.preprocessing, "alpha" if item.mask == "alpha" else "file")
        return mask_weights(mask, self.factor, manifest.unmasked_weight)


def mask_weights(mask: np.ndarray, factor: int, unmasked_weight: float) -> torch.Tensor:
    """[H, W] of 0 to 1 -> float32 [1, H/f, W/f] of unmasked_weight to 1: the mean over each latent pixel's area."""
    import torch

    height, width = mask.shape
    means = mask.astype(np.float64).reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))
    return torch.from_numpy(unmasked_weight + (1 - unmasked_weight) * means).float()[None]


def plan(
    context: Context, key_of: Callable[[Item, View], str | None]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Job]]:
    """File name -> key of each view, and key -> what it shows: of pictures that show the same, the first by name."""
    keys: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, Job] = {}
    for item in sorted(context.manifest.items, key=lambda item: item.file_name):
        pairs = [(key_of(item, view), view) for view in context.views(item)]
        named = [(key, view) for key, view in pairs if key is not None]
        keys[item.file_name] = tuple(key for key, _ in named)
        for key, view in named:
            jobs.setdefault(key, Job(item, view))
    return keys, jobs


# What is missing

W = TypeVar("W", Views, Captions)


def complete(build: Callable[[Context, Setting], W], context: Context, setting: Setting) -> W:
    """Encode what the store lacks; in smaller batches, then in tiles, where memory is short.

    Raises:
        UserError: even one picture, in tiles, does not fit.
    """
    while True:
        work = build(context, setting)
        missing = [key for key in work.jobs if not context.store.has(work.kind, key)]
        if not missing:
            return work
        try:
            fill_timed(work, missing)
        except OutOfMemory:
            setting = smaller(setting, work.kind)
        else:
            return work


def fill_timed(work: Views | Captions, keys: list[str]) -> None:
    _ = work.encoder  # loading is no part of the rate
    start = time.monotonic()
    work.fill(keys)
    seconds = time.monotonic() - start
    size = sum(work.context.store.path(work.kind, key).stat().st_size for key in keys)
    work.effort = Effort(sum(map(work.units, keys)), seconds, size, -(-len(keys) // work.setting.batch_size))
    del work.encoder  # frees its memory for what comes next


def smaller(setting: Setting, kind: Kind) -> Setting:
    """The next thing to try. Both are part of every key, so that nothing that was encoded otherwise mixes with it."""
    size = setting.batch_size
    if size > 1:
        tried, half = "params.yaml cache.batch_size", size // 2
        advice = f"set cache.batch_size: {half} to say so"
        log.warning(
            "warning: %s: %d does not fit into memory; starting %s again with %d; %s", tried, size, kind, half, advice
        )
        return replace(setting, batch_size=half)
    if kind == "latents" and not setting.tiling:
        log.warning(
            "warning: a picture does not fit into memory; starting again in tiles; set cache.tiling: true to say so"
        )
        return replace(setting, tiling=True)
    tried = "one picture in tiles" if kind == "latents" else "one caption"
    raise UserError(
        f"params.yaml cache.batch_size: even {tried} does not fit into memory; free some of it, "
        "lower dataset.resolution, or use another runtime.device"
    )
