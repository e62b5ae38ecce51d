"""Training batches from the cache: images of one latent shape, each with a random view, caption, noise and timestep."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.core import seeding
from stages.train import noising

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from stages.train.params import TrainParams


@dataclass(frozen=True)
class Batch:
    """B samples of one latent shape."""

    latents: torch.Tensor  # [B, C, h, w] float32, in the denoiser's space
    noise: torch.Tensor  # [B, C, h, w] float32, the noise to predict
    added_noise: torch.Tensor  # [B, C, h, w] float32, noise in the noisy latents: equal to noise, or perturbed
    timesteps: torch.Tensor  # [B] int64
    captions: list[str]  # B captions; empty where dropped
    prompt: dict[str, torch.Tensor]  # name -> cached conditioning, [B, ...]; float32 on the device
    weights: torch.Tensor  # [B] float32, loss_weight of each image
    masks: torch.Tensor | None  # [B, 1, h, w] float32; None if no image of the run has a mask

    @classmethod
    def cat(cls, parts: Sequence[Batch]) -> Batch:
        """Concatenate batches."""
        return cls._combine(parts, torch.cat)

    def first(self, count: int) -> Batch:
        """Return the first samples."""
        return replace(self._combine([self], lambda tensors: tensors[0][:count]), captions=self.captions[:count])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, with the conditioning in float32."""
        moved = self._combine([self], lambda tensors: tensors[0].to(device))
        return replace(moved, prompt={name: tensor.float() for name, tensor in moved.prompt.items()})

    @classmethod
    def _combine(cls, parts: Sequence[Batch], combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> Batch:
        """Combine each tensor of the parts by a function."""

        def combined(value: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
            return combine([value(part) for part in parts])

        return cls(
            latents=combined(lambda part: part.latents),
            noise=combined(lambda part: part.noise),
            added_noise=combined(lambda part: part.added_noise),
            timesteps=combined(lambda part: part.timesteps),
            captions=[caption for part in parts for caption in part.captions],
            prompt={name: combine([part.prompt[name] for part in parts]) for name in parts[0].prompt},
            weights=combined(lambda part: part.weights),
            masks=None if parts[0].masks is None else combine([part.masks for part in parts if part.masks is not None]),
        )


class Batches:
    """Endless sequence of the batches of one run."""

    def __init__(
        self,
        cache: LatentCache,
        items: list[CachedItem],
        params: TrainParams,
        timesteps: noising.Timesteps,
        device: torch.device,
        drops_to_zeros: bool = False,
    ) -> None:
        """Prepare the order of the images.

        Args:
            drops_to_zeros: whether a dropped caption's embeddings are zeros instead of the empty caption's.
        """
        self.cache, self.items, self.params = cache, items, params
        self.timesteps, self.device, self.drops_to_zeros = timesteps, device, drops_to_zeros
        self.zeroed = cache.manifest["conditioning"] if drops_to_zeros else []
        self.order = BatchOrder(buckets_by_shape(cache, items), params.batch_size, params.seed)
        self.masked = any(item.masks for item in items)

    def with_items(self, items: list[CachedItem], **changes: Any) -> Batches:
        """Return batches of other images with the same settings, except ``changes`` of section ``train``."""
        params = self.params.model_copy(update=changes)
        return Batches(self.cache, items, params, self.timesteps, self.device, self.drops_to_zeros)

    def batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch number ``micro`` of an optimizer step, on the device."""
        size = self.params.batch_size
        items = self.order.items(step * self.params.gradient_accumulation_steps + micro)
        slots = range(micro * size, (micro + 1) * size)
        samples = [self.sample(item, step, slot) for item, slot in zip(items, slots, strict=True)]
        return Batch.cat(samples).to(self.device)

    def sample(self, item: CachedItem, step: int, slot: int) -> Batch:
        """Draw a batch of this one image on the CPU. Its random numbers depend on seed, purpose, step and slot only."""

        def draw(purpose: str) -> torch.Generator:
            return seeding.generator(self.params.seed, purpose, step, slot)

        view = int(torch.randint(len(item.views), (), generator=draw("view")))
        mean, std = self.cache.latents(item.views[view])
        latents = mean + std * torch.randn(mean.shape, generator=draw("posterior"))
        noise, added_noise = noising.draw_noise(draw, mean.shape, self.params)
        timestep = self.timesteps.draw(draw("timestep"), noising.num_tokens(mean))
        dropped = torch.rand((), generator=draw("prompt")) < self.params.prompt_dropout
        chosen = item.captions[int(torch.randint(len(item.captions), (), generator=draw("caption")))]
        caption = "" if dropped else chosen
        prompt = self.cache.stored_prompt(caption, item.views[view])
        if dropped:
            prompt |= {name: torch.zeros_like(prompt[name]) for name in self.zeroed}
        mask = self.cache.mask(item.masks[view]) if item.masks else torch.ones_like(mean[:1])  # [1, h, w]
        return Batch(
            latents[None],
            noise[None],
            added_noise[None],
            timestep[None],
            [caption],
            {name: tensor[None] for name, tensor in prompt.items()},
            torch.tensor([item.loss_weight]),
            mask[None] if self.masked else None,
        )


# Order of the images


@dataclass(frozen=True)
class Bucket:
    """Images of one latent shape."""

    height: int
    """Height in latent pixels."""
    width: int
    """Width in latent pixels."""
    items: list[CachedItem]

    @property
    def name(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def entries(self) -> list[CachedItem]:
        """Images of an epoch, each as often as its ``repeats``."""
        return [item for item in self.items for _ in range(item.repeats)]


def buckets_by_shape(cache: LatentCache, items: Iterable[CachedItem]) -> list[Bucket]:
    """Return the buckets in order of height and width. All views of an image have one shape."""
    by_shape = defaultdict(list)
    for item in items:
        by_shape[cache.size(item.views[0])].append(item)
    return [Bucket(*shape, members) for shape, members in sorted(by_shape.items())]


class BatchOrder:
    """Images of each micro-batch of a run, as a function of the seed and the micro-batch's number.

    The n entries of a bucket form an endless stream of epochs, each a new permutation. Micro-batch k of the bucket has
    the entries k * B to (k + 1) * B - 1 of the stream, and so is always full. The buckets alternate in cycles of about
    one epoch: cycle c has floor(n * (c + 1) / B) - floor(n * c / B) micro-batches of the bucket, and a seeded shuffle
    mixes the micro-batches of all buckets. So every image is used equally often, even if B does not divide n.
    """

    def __init__(self, buckets: list[Bucket], batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.entries = [bucket.entries for bucket in buckets]
        self.num_entries = sum(map(len, self.entries))  # per epoch

    def items(self, number: int) -> list[CachedItem]:
        """Return the ``batch_size`` images of a micro-batch, counted from 0 over the whole run."""
        bucket, rank = self.bucket_turn(number)
        entries = self.entries[bucket]
        purpose = "order" if len(self.buckets) == 1 else f"order {self.buckets[bucket].name}"
        items = []
        for position in range(rank * self.batch_size, (rank + 1) * self.batch_size):
            epoch, offset = divmod(position, len(entries))
            items.append(entries[seeding.permutation(self.seed, epoch, len(entries), purpose)[offset]])
        return items

    def bucket_turn(self, number: int) -> tuple[int, int]:
        """Return the index of a micro-batch's bucket, and the number of earlier micro-batches of that bucket."""
        # num_before(c) is above c * num_entries / B - len(buckets), so the cycle's number is below this one.
        beyond = (number + len(self.buckets)) * self.batch_size // self.num_entries + 1
        cycle = bisect_right(range(beyond), number, key=lambda c: sum(self.num_before(c))) - 1
        before, after = self.num_before(cycle), self.num_before(cycle + 1)
        turns = [bucket for bucket, ends in enumerate(zip(before, after, strict=True)) for _ in range(*ends)]
        shuffled = seeding.permutation(self.seed, cycle, len(turns), "buckets")
        position = number - sum(before)
        bucket = turns[shuffled[position]]
        return bucket, before[bucket] + sum(turns[index] == bucket for index in shuffled[:position])

    def num_before(self, cycle: int) -> list[int]:
        """Return the number of micro-batches of each bucket in the cycles before this one."""
        return [len(entries) * cycle // self.batch_size for entries in self.entries]
