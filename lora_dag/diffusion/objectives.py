"""Prediction types, one small class each: how noise is added to latents, and the denoiser's target.

Tensors are float32 [B, C, h, w], timesteps int64 [B]. A timestep is from 0 (least noise) to num_train_timesteps - 1
for every scheduler. A new prediction type is one class and its name in OBJECTIVES.

Sources: epsilon and alpha-bar, Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 14; v, Salimans & Ho 2022 (arXiv:2202.00512)
appendix D; flow matching, Lipman et al. 2023 (arXiv:2210.02747) eq. 22 and 23 and Esser et al. 2024 (arXiv:2403.03206)
eq. 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora_dag.core.console import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Objective(Protocol):
    """Interface of a prediction type, used by train, validate and export."""

    @property
    def noise_scheduler(self) -> SchedulerMixin:
        """Scheduler that the base model was trained with."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return noisy latents."""

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's input for these timesteps, [B]."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the target of the denoiser's prediction."""


@runtime_checkable
class HasSnr(Protocol):
    """Interface of an objective whose losses can be weighted by the signal-to-noise ratio."""

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio, float32 [B]."""

    def squared_error(self, snr: torch.Tensor) -> torch.Tensor:
        """Return the squared error of the prediction if the squared error of the clean latents is 1, float32 [B]."""


# Diffusion: noisy_latents = sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise


def diffuse(objective: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return noisy latents of the scheduler, [B, C, h, w]."""
    return objective.noise_scheduler.add_noise(latents, noise, timesteps)


def unchanged(objective: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the timesteps, which are the denoiser's input."""
    return timesteps


def diffusion_snr(objective: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Return alpha_bar / (1 - alpha_bar), float32 [B]."""
    alpha_bar = objective.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


@dataclass(frozen=True)
class Epsilon:
    """Prediction of the noise."""

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
    """Prediction of v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents."""

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
    """Prediction of the clean latents."""

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
    """Prediction of the velocity of the straight path from the latents to the noise."""

    noise_scheduler: SchedulerMixin

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the share of noise in (0, 1], with the shift of the scheduler's config, float32 [B]."""
        ascending = self.noise_scheduler.sigmas.flip(0)  # the scheduler has them in descending order
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
    """Return the prediction type of the scheduler's config; ``flow_prediction`` for flow matching, which has no key."""
    return noise_scheduler.config.get("prediction_type", "flow_prediction")


def make_objective(noise_scheduler: SchedulerMixin) -> Objective:
    """Return the objective that the base model was trained with.

    Raises:
        UserError: the prediction type of the scheduler's config is unknown.
    """
    name = prediction_type(noise_scheduler)
    if name not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        text = f"model.pretrained: its scheduler has prediction_type '{name}', but one of {known} is expected."
        raise UserError(Problem("unknown-prediction-type", text))
    return OBJECTIVES[name](noise_scheduler)


def masked_mean(errors: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of each sample's errors under its mask, [B]: sum(m * e) / (C * sum(m)); a mean without masks.

    The sum is divided by the area of the mask, so that a small subject counts as much as a large one.

    Args:
        errors: [B, C, h, w].
        masks: [B, 1, h, w], weights from 0 to 1, not all 0 in a sample, which cache_latents rejects.
    """
    if masks is None:
        return errors.flatten(1).mean(1)
    covered = masks.flatten(1).sum(1) * errors.shape[1]  # [B]
    return (errors * masks).flatten(1).sum(1) / covered
