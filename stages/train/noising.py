"""Timestep and noise of a training sample, as a function of the given random generators.

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

from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from stages.train.params import TrainParams

    Draw = Callable[[str], torch.Generator]
    """Function that returns this sample's random generator for a purpose."""

PATCH = 2  # latent pixels per token and axis, in every transformer with a shift by the number of tokens


@dataclass(frozen=True)
class Timesteps:
    """Distribution of the timesteps, integers from 0 to ``num_train_timesteps`` - 1."""

    num_train_timesteps: int
    first: int
    """Lowest timestep."""
    end: int
    """Highest timestep + 1."""
    logit_normal: tuple[float, float] | None
    """Mean and standard deviation of logit(t / num_train_timesteps); None for uniform."""
    shift: Callable[[int], float]
    """Function of the number of tokens that returns s; t in [0, 1] becomes s t / (1 + (s - 1) t). s = 1: no change."""

    def draw(self, generator: torch.Generator, num_tokens: int) -> torch.Tensor:
        """Draw one timestep, int64 []."""
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
    """Return the distribution of section ``train`` for the base's scheduler.

    Raises:
        UserError: the range is empty, or the scheduler has no shift by resolution.
    """
    num = noise_scheduler.config.num_train_timesteps
    first, end = (round(share * num) for share in params.timestep_range)
    if first >= end:
        text = (
            f"{params.setting('timestep_range')}: {params.timestep_range} contains none of {num} timesteps. Widen it."
        )
        raise UserError(Problem("empty-timestep-range", text))
    logit_normal = (params.logit_mean, params.logit_std) if params.timestep_sampling == "logit_normal" else None
    return Timesteps(num, first, end, logit_normal, make_shift(params, noise_scheduler))


def make_shift(params: TrainParams, noise_scheduler: SchedulerMixin) -> Callable[[int], float]:
    """Return the shift as a function of the number of tokens; ``auto`` is the scheduler's shift when sampling."""
    shift = params.timestep_shift
    if isinstance(shift, float):
        return lambda num_tokens: shift
    config = noise_scheduler.config
    if not config.get("use_dynamic_shifting"):
        name = type(noise_scheduler).__name__
        text = f"auto needs a scheduler with use_dynamic_shifting, but {name} has none. Use a number; 1.0 is no shift."
        raise UserError(Problem("no-dynamic-shift", f"{params.setting('timestep_shift')}: {text}"))
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return lambda num_tokens: math.exp(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def num_tokens(latents: torch.Tensor) -> int:
    """Return the number of tokens of a transformer for latents [..., h, w]."""
    return latents.shape[-2] * latents.shape[-1] // PATCH**2


def draw_noise(draw: Draw, shape: torch.Size, params: TrainParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise to predict and the noise to add, float32 [C, h, w]; equal without ``input_perturbation``."""
    noise = torch.randn(shape, generator=draw("noise"))
    if params.multires_noise_discount:
        noise = multires_noise(noise, draw("multires-noise"), params.multires_noise_discount)
    if params.noise_offset:
        noise = noise + params.noise_offset * torch.randn(shape[0], 1, 1, generator=draw("noise-offset"))
    if not params.input_perturbation:
        return noise, noise
    return noise, noise + params.input_perturbation * torch.randn(shape, generator=draw("input-perturbation"))


def multires_noise(noise: torch.Tensor, generator: torch.Generator, discount: float) -> torch.Tensor:
    """Add upscaled noise of lower and lower resolutions, the k-th with factor discount^k, and scale to a std of 1."""
    channels, height, width = noise.shape
    total, level = noise.clone(), 0
    while height > 1 or width > 1:
        level += 1
        factor = 2 + 2 * float(torch.rand((), generator=generator))
        height, width = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(1, channels, height, width, generator=generator)
        total += discount**level * torch.nn.functional.interpolate(coarse, noise.shape[1:], mode="bilinear")[0]
    return total / total.std()
