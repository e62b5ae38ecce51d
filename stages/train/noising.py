"""Which timestep a training sample gets, and which noise: a function of the generators that are passed.

Sources: noise offset, Guttenberg 2023 (crosslabs.org, "Diffusion with offset noise"); multi-resolution noise, Whitaker
2023 (wandb.ai, "Multi-resolution noise for diffusion model training"); input perturbation, Ning et al. 2023
(arXiv:2301.11706) algorithm 1; logit-normal timesteps and their shift, Esser et al. 2024 (arXiv:2403.03206) eq. 19 and
23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from stages.train.params import TrainParams

    Draw = Callable[[str], torch.Generator]
    """Purpose -> the generator of this sample's draw for it."""

PATCH = 2  # latents per token and direction, in every transformer whose scheduler shifts by the number of tokens


@dataclass(frozen=True)
class Timesteps:
    """How timesteps 0 to ``num_train_timesteps`` - 1 are drawn."""

    num_train_timesteps: int
    first: int
    """Lowest that is drawn,"""
    end: int
    """and the one after the highest."""
    logit_normal: tuple[float, float] | None
    """Mean and standard deviation of logit(t / num_train_timesteps); None for uniform."""
    shift: Callable[[int], float]
    """Number of tokens -> s; t becomes s t / (1 + (s - 1) t) for t in 0 to 1. 1 changes nothing."""

    def draw(self, generator: torch.Generator, num_tokens: int) -> torch.Tensor:
        """One timestep, int64 []."""
        shift = self.shift(num_tokens)
        if self.logit_normal is None and shift == 1:
            return self.first + torch.randint(self.end - self.first, (), generator=generator)
        if self.logit_normal is None:
            share = torch.rand((), generator=generator, dtype=torch.float64)
        else:
            mean, std = self.logit_normal
            share = torch.sigmoid(mean + std * torch.randn((), generator=generator, dtype=torch.float64))
        shifted = shift * share / (1 + (shift - 1) * share)
        return (self.first + shifted * (self.end - self.first)).long().clamp(max=self.end - 1)


def make_timesteps(params: TrainParams, noise_scheduler: SchedulerMixin) -> Timesteps:
    """As section ``train`` says, for the base's scheduler.

    Raises:
        UserError: an empty range, or a shift by resolution that the scheduler does not know.
    """
    num = noise_scheduler.config.num_train_timesteps
    first, end = (round(share * num) for share in params.timestep_range)
    if first >= end:
        raise UserError(f"params.yaml train.timestep_range: {params.timestep_range} holds none of {num} timesteps")
    logit_normal = (params.logit_mean, params.logit_std) if params.timestep_sampling == "logit_normal" else None
    return Timesteps(num, first, end, logit_normal, make_shift(params.timestep_shift, noise_scheduler))


def make_shift(shift: float | str, noise_scheduler: SchedulerMixin) -> Callable[[int], float]:
    """``auto`` is what the scheduler does when sampling at that number of tokens."""
    if isinstance(shift, float):
        return lambda num_tokens: shift
    config = noise_scheduler.config
    if not config.get("use_dynamic_shifting"):
        found = f"auto is for schedulers with use_dynamic_shifting, not this {type(noise_scheduler).__name__}"
        raise UserError(f"params.yaml train.timestep_shift: {found}; use a number, 1.0 for none")
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return lambda num_tokens: math.exp(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def num_tokens(latents: torch.Tensor) -> int:
    """Of a transformer on latents [..., h, w]."""
    return latents.shape[-2] * latents.shape[-1] // PATCH**2


def draw_noise(draw: Draw, shape: torch.Size, params: TrainParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise to predict and noise to add, float32 [C, h, w] each; the same but for ``train.input_perturbation``."""
    noise = torch.randn(shape, generator=draw("noise"))
    if params.multires_noise_discount:
        noise = multires_noise(noise, draw("multires-noise"), params.multires_noise_discount)
    if params.noise_offset:
        noise = noise + params.noise_offset * torch.randn(shape[0], 1, 1, generator=draw("noise-offset"))
    if not params.input_perturbation:
        return noise, noise
    return noise, noise + params.input_perturbation * torch.randn(shape, generator=draw("input-perturbation"))


def multires_noise(noise: torch.Tensor, generator: torch.Generator, discount: float) -> torch.Tensor:
    """Noise of ever fewer pixels, scaled up and added: the k-th by discount^k; brought back to a std of 1."""
    channels, height, width = noise.shape
    total, level = noise.clone(), 0
    while height > 1 or width > 1:
        level += 1
        factor = 2 + 2 * float(torch.rand((), generator=generator))
        height, width = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(1, channels, height, width, generator=generator)
        total += discount**level * torch.nn.functional.interpolate(coarse, noise.shape[1:], mode="bilinear")[0]
    return total / total.std()
