"""Training batches drawn from the cache: pictures of one shape, each with view, caption, noise and timestep."""

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
    """Tensors of B samples of one latent shape."""

    latents: torch.Tensor  # [B, C, h, w] float32, in the denoiser's space
    noise: torch.Tensor  # [B, C, h, w] float32, what is to be predicted
    added_noise: torch.Tensor  # [B, C, h, w] float32, what is in the noisy latents: the same, or perturbed
    timesteps: torch.Tensor  # [B] int64
    captions: list[str]  # B; the empty one where it was dropped
    prompt: dict[str, torch.Tensor]  # name -> [B, ...], what the cache says of them
    weights: torch.Tensor  # [B] float32, each picture's own loss_weight
    masks: torch.Tensor | None  # [B, 1, h, w] float32; None where no picture of the run has one

    @classmethod
    def cat(cls, parts: Sequence[Batch]) -> Batch:
        """One batch of them all, in their order."""
        return cls._each(parts, torch.cat)

    def first(self, count: int) -> Batch:
        return replace(self._each([self], lambda tensors: tensors[0][:count]), captions=self.captions[:count])

    def to(self, device: torch.device) -> Batch:
        return self._each([self], lambda tensors: tensors[0].to(device))

    @classmethod
    def _each(cls, parts: Sequence[Batch], combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> Batch:
        """The batch whose every tensor is made of that tensor of the parts."""

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
    """The endless sequence of batches of one run."""

    def __init__(
        self,
        cache: LatentCache,
        items: list[CachedItem],
        params: TrainParams,
        timesteps: noising.Timesteps,
        device: torch.device,
        drops_to_zeros: bool = False,  # as the family says
    ) -> None:
        self.cache, self.items, self.params = cache, items, params
        self.timesteps, self.device, self.drops_to_zeros = timesteps, device, drops_to_zeros
        self.zeroed = cache.manifest["conditioning"] if drops_to_zeros else []
        self.order = Order(by_shape(cache, items), params.batch_size, params.seed)
        self.masked = any(item.masks for item in items)

    def of(self, items: list[CachedItem], **changes: Any) -> Batches:
        """Of other pictures, drawn in the same way but for ``changes`` of the parameters."""
        params = self.params.model_copy(update=changes)
        return Batches(self.cache, items, params, self.timesteps, self.device, self.drops_to_zeros)

    def batch(self, step: int, micro: int) -> Batch:
        """The micro-batch ``micro`` of an optimizer step."""
        size = self.params.batch_size
        items = self.order.items(step * self.params.gradient_accumulation_steps + micro)
        slots = range(micro * size, (micro + 1) * size)
        samples = [self.sample(item, step, slot) for item, slot in zip(items, slots, strict=True)]
        return Batch.cat(samples).to(self.device)

    def sample(self, item: CachedItem, step: int, slot: int) -> Batch:
        """A batch of this one picture, drawn on the CPU."""

        def draw(purpose: str) -> torch.Generator:
            return seeding.generator(self.params.seed, purpose, step, slot)

        view = int(torch.randint(len(item.views), (), generator=draw("view")))
        mean, std = self.cache.latents(item.views[view])
        latents = mean + std * torch.randn(mean.shape, generator=draw("posterior"))
        noise, added_noise = noising.draw_noise(draw, mean.shape, self.params)
        timestep = self.timesteps.draw(draw("timestep"), noising.num_tokens(mean))
        dropped = torch.rand((), generator=draw("prompt")) < self.params.prompt_dropout
        drawn = item.captions[int(torch.randint(len(item.captions), (), generator=draw("caption")))]
        caption = "" if dropped else drawn
        prompt = self.cache.prompt(caption, item.views[view])
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


# Which pictures stand together


@dataclass(frozen=True)
class Bucket:
    """The pictures of one latent shape."""

    height: int
    """Of the latents, not in pixels."""
    width: int
    items: list[CachedItem]

    @property
    def name(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def entries(self) -> list[CachedItem]:
        """An epoch's pictures: each as often as it repeats."""
        return [item for item in self.items for _ in range(item.repeats)]


def by_shape(cache: LatentCache, items: Iterable[CachedItem]) -> list[Bucket]:
    """Buckets in order of height and width. All views of a picture have one shape."""
    found = defaultdict(list)
    for item in items:
        found[cache.size(item.views[0])].append(item)
    return [Bucket(*shape, members) for shape, members in sorted(found.items())]


class Order:
    """Which pictures each micro-batch of a run holds: a function of the seed and its number.

    A bucket of n entries is an endless stream of epochs, each another permutation of them; its k-th micro-batch holds
    the entries k * B to (k + 1) * B - 1 of that stream, and so is always full. The buckets take turns in cycles of
    about one epoch: cycle c holds floor(n * (c + 1) / B) - floor(n * c / B) micro-batches of the bucket, and seeded
    shuffling mixes those of all buckets. So every picture comes up as often as its epochs say, whatever B leaves over.
    """

    def __init__(self, buckets: list[Bucket], batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.entries = [bucket.entries for bucket in buckets]
        self.num_entries = sum(map(len, self.entries))  # of an epoch

    def items(self, number: int) -> list[CachedItem]:
        """The ``batch_size`` pictures of a micro-batch, counted from 0 over the whole run."""
        bucket, rank = self.turn(number)
        entries = self.entries[bucket]
        purpose = "order" if len(self.buckets) == 1 else f"order {self.buckets[bucket].name}"
        found = []
        for position in range(rank * self.batch_size, (rank + 1) * self.batch_size):
            epoch, offset = divmod(position, len(entries))
            found.append(entries[seeding.permutation(self.seed, epoch, len(entries), purpose)[offset]])
        return found

    def turn(self, number: int) -> tuple[int, int]:
        """Index of the bucket whose turn a micro-batch is, and how many the same bucket has had before."""
        # num_before(c) is above c * num_entries / B - len(buckets), so the cycle's number is below this one.
        beyond = (number + len(self.buckets)) * self.batch_size // self.num_entries + 1
        cycle = bisect_right(range(beyond), number, key=lambda c: sum(self.num_before(c))) - 1
        before, after = self.num_before(cycle), self.num_before(cycle + 1)
        turns = [bucket for bucket, ends in enumerate(zip(before, after, strict=True)) for _ in range(*ends)]
        shuffled = seeding.permutation(self.seed, cycle, len(turns), "buckets")
        place = number - sum(before)
        bucket = turns[shuffled[place]]
        return bucket, before[bucket] + sum(turns[index] == bucket for index in shuffled[:place])

    def num_before(self, cycle: int) -> list[int]:
        """Micro-batches of each bucket in the cycles before this one."""
        return [len(entries) * cycle // self.batch_size for entries in self.entries]
