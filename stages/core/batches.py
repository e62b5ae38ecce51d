"""Training batches drawn from the cache: picture, view, noise, timestep and caption, functions of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stages.core import seeding

if TYPE_CHECKING:
    from stages.artifacts.latent_cache import CachedItem, LatentCache


@dataclass(frozen=True)
class Batch:
    """Tensors of B samples, on the device."""

    latents: torch.Tensor  # [B, C, h, w] float32, in the denoiser's space
    noise: torch.Tensor  # [B, C, h, w] float32
    timesteps: torch.Tensor  # [B] int64
    prompt: dict[str, torch.Tensor]  # name -> [B, ...]

    def first(self, count: int) -> Batch:
        prompt = {name: tensor[:count] for name, tensor in self.prompt.items()}
        return Batch(self.latents[:count], self.noise[:count], self.timesteps[:count], prompt)


class Batches:
    """The endless sequence of batches of one run."""

    def __init__(
        self,
        cache: LatentCache,
        items: list[CachedItem],
        *,
        batch_size: int,
        accumulation: int,
        prompt_dropout: float,
        num_train_timesteps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.cache, self.items, self.device, self.seed = cache, items, device, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.prompt_dropout, self.num_train_timesteps = prompt_dropout, num_train_timesteps

    def batch(self, step: int, micro: int) -> Batch:
        """The micro-batch ``micro`` of an optimizer step."""
        slots = range(micro * self.batch_size, (micro + 1) * self.batch_size)
        latents, noise, timesteps, prompts = zip(*(self.sample(step, slot) for slot in slots), strict=True)
        return Batch(
            torch.stack(latents).to(self.device),
            torch.stack(noise).to(self.device),
            torch.stack(timesteps).to(self.device),
            {name: torch.stack([p[name] for p in prompts]).to(self.device) for name in prompts[0]},
        )

    def sample(self, step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """One sample: latents and noise [C, h, w], timestep [], prompt tensors; drawn on the CPU."""

        def draw(purpose: str) -> torch.Generator:
            return seeding.generator(self.seed, purpose, step, slot)

        position = step * self.batch_size * self.accumulation + slot
        epoch, offset = divmod(position, len(self.items))
        item = self.items[seeding.permutation(self.seed, epoch, len(self.items))[offset]]
        view = item.views[int(torch.randint(len(item.views), (), generator=draw("view")))]
        mean, std = self.cache.latents(view)
        latents = mean + std * torch.randn(mean.shape, generator=draw("posterior"))
        noise = torch.randn(mean.shape, generator=draw("noise"))
        timestep = torch.randint(self.num_train_timesteps, (), generator=draw("timestep"))
        dropped = torch.rand((), generator=draw("prompt")) < self.prompt_dropout
        return latents, noise, timestep, self.cache.prompt("" if dropped else item.caption)
