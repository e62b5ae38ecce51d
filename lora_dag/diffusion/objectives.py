"""What the denoiser is asked to predict.

A timestep counts noise from 0 (least) to num_train_timesteps - 1 under every schedule.

Sources: epsilon and alpha-bar, Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 14; v, Salimans & Ho 2022 (arXiv:2202.00512)
appendix D; flow matching, Lipman et al. 2023 (arXiv:2210.02747) eq. 22 and 23 and Esser et al. 2024 (arXiv:2403.03206)
eq. 13: x_sigma = (1 - sigma) x + sigma noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


def prediction_type(noise_scheduler: SchedulerMixin) -> str:
    """As the scheduler's config says; ``flow_prediction`` for flow matching, whose config has no such key."""
    return noise_scheduler.config.get("prediction_type", "flow_prediction")


def sigmas(noise_scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """Flow matching's share of noise per timestep, in (0, 1], shifted as the scheduler's config says; float32 [B]."""
    return noise_scheduler.sigmas.flip(0).to(timesteps.device)[timesteps].float()  # the scheduler's run down


def add_noise(
    noise_scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Noisy latents, float32 [B, C, h, w]."""
    if prediction_type(noise_scheduler) != "flow_prediction":
        return noise_scheduler.add_noise(latents, noise, timesteps)
    sigma = sigmas(noise_scheduler, timesteps)[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def model_timesteps(noise_scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """What the denoiser is told, [B]: the timestep, or sigma * num_train_timesteps under flow matching."""
    if prediction_type(noise_scheduler) != "flow_prediction":
        return timesteps
    return sigmas(noise_scheduler, timesteps) * noise_scheduler.config.num_train_timesteps


def target(
    noise_scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The prediction's target by ``prediction_type``, float32 [B, C, h, w].

    Raises:
        ValueError: a prediction type that the scheduler's config names and this project does not know.
    """
    kind = prediction_type(noise_scheduler)
    if kind == "flow_prediction":
        return noise - latents
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"scheduler prediction_type '{kind}': expected epsilon, v_prediction, sample or flow matching")


def masked_mean(errors: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """Mean of each sample's errors where its mask looks, [B]: sum(m * e) / (C * sum(m)); a plain mean without masks.

    Divided by what the mask covers, so that a small subject counts as much as a large one.

    Args:
        errors: [B, C, h, w].
        masks: [B, 1, h, w], weights from 0 to 1, not all 0 in a sample; cache_latents refuses masks that are.
    """
    if masks is None:
        return errors.flatten(1).mean(1)
    covered = masks.flatten(1).sum(1) * errors.shape[1]  # [B]
    return (errors * masks).flatten(1).sum(1) / covered
