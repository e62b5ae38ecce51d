"""Prediction types, one small class each: how latents become noisy, and what the denoiser learns to predict.

Tensors are float32 [B, C, h, w], timesteps int64 [B]. A timestep counts noise from 0 (least) to num_train_timesteps - 1
under every schedule. A new prediction type is one class and its name in OBJECTIVES.

Sources: epsilon and alpha-bar, Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 14; v, Salimans & Ho 2022 (arXiv:2202.00512)
appendix D; flow matching, Lipman et al. 2023 (arXiv:2210.02747) eq. 22 and 23 and Esser et al. 2024 (arXiv:2403.03206)
eq. 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora_dag.core.console import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Objective(Protocol):
    """What training, validate and export ask of a prediction type."""

    @property
    def noise_scheduler(self) -> SchedulerMixin:
        """The scheduler that the base was trained with."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents."""

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The numbers that the denoiser receives for these timesteps, [B]."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict."""


@runtime_checkable
class HasSnr(Protocol):
    """An objective whose losses can be weighted by the signal-to-noise ratio."""

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio, float32 [B]."""

    def squared_error(self, snr: torch.Tensor) -> torch.Tensor:
        """Squared error of the prediction where that of the clean latents is 1, float32 [B]."""


# Diffusion: noisy_latents = sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise


def diffuse(objective: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return objective.noise_scheduler.add_noise(latents, noise, timesteps)


def unchanged(objective: Any, timesteps: torch.Tensor) -> torch.Tensor:
    return timesteps


def diffusion_snr(objective: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_bar / (1 - alpha_bar)."""
    alpha_bar = objective.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


@dataclass(frozen=True)
class Epsilon:
    """Predicts the noise."""

    noise_scheduler: SchedulerMixin
    add_noise = diffuse
    model_timesteps = unchanged
    snr = diffusion_snr

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise

    def squared_error(self, snr: torch.Tensor) -> torch.Tensor:
        return snr


@dataclass(frozen=True)
class VPrediction:
    """Predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents."""

    noise_scheduler: SchedulerMixin
    add_noise = diffuse
    model_timesteps = unchanged
    snr = diffusion_snr

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.noise_scheduler.get_velocity(latents, noise, timesteps)

    def squared_error(self, snr: torch.Tensor) -> torch.Tensor:
        return snr + 1


@dataclass(frozen=True)
class Sample:
    """Predicts the clean latents."""

    noise_scheduler: SchedulerMixin
    add_noise = diffuse
    model_timesteps = unchanged
    snr = diffusion_snr

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents

    def squared_error(self, snr: torch.Tensor) -> torch.Tensor:
        return snr.new_ones(snr.shape)


# Flow matching: noisy_latents = (1 - sigma) latents + sigma noise


@dataclass(frozen=True)
class FlowMatching:
    """Predicts the velocity of the straight path from the latents to the noise."""

    noise_scheduler: SchedulerMixin

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Share of noise in (0, 1], shifted as the scheduler's config says, float32 [B]."""
        ascending = self.noise_scheduler.sigmas.flip(0)  # the scheduler's run down
        return ascending.to(timesteps.device)[timesteps].float()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = self.sigmas(timesteps)[:, None, None, None]
        return (1 - sigma) * latents + sigma * noise

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.sigmas(timesteps) * self.noise_scheduler.config.num_train_timesteps

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents


OBJECTIVES: dict[str, Callable[[SchedulerMixin], Objective]] = {
    "epsilon": Epsilon,
    "v_prediction": VPrediction,
    "sample": Sample,
    "flow_prediction": FlowMatching,
}


def prediction_type(noise_scheduler: SchedulerMixin) -> str:
    """As the scheduler's config says; ``flow_prediction`` for flow matching, whose config has no such key."""
    return noise_scheduler.config.get("prediction_type", "flow_prediction")


def make_objective(noise_scheduler: SchedulerMixin) -> Objective:
    """The objective that the base was trained with.

    Raises:
        UserError: no class here has the prediction type of the scheduler's config.
    """
    name = prediction_type(noise_scheduler)
    if name not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise UserError(f"model.pretrained: its scheduler has prediction_type '{name}'; expected one of {known}")
    return OBJECTIVES[name](noise_scheduler)


def masked_mean(errors: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """Mean of each sample's errors under its mask, [B]: sum(m * e) / (C * sum(m)); a plain mean without masks.

    The sum is divided by what the mask covers, so that a small subject counts as much as a large one.

    Args:
        errors: [B, C, h, w].
        masks: [B, 1, h, w], weights from 0 to 1, not all 0 in a sample; cache_latents refuses masks that are.
    """
    if masks is None:
        return errors.flatten(1).mean(1)
    covered = masks.flatten(1).sum(1) * errors.shape[1]  # [B]
    return (errors * masks).flatten(1).sum(1) / covered
