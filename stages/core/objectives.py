"""What the denoiser is asked to predict, and how much each timestep and each pixel counts.

Sources: epsilon and alpha-bar, Ho et al. 2020 (arXiv:2006.11239) eq. 4 and 14; v, Salimans & Ho 2022 (arXiv:2202.00512)
appendix D; min-SNR, Hang et al. 2023 (arXiv:2303.09556) eq. 8 and section 3.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


def target(
    noise_scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The prediction's target by ``prediction_type``, float32 [B, C, h, w].

    Raises:
        ValueError: a prediction type that the scheduler's config names and this project does not know.
    """
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"scheduler prediction_type '{kind}': expected epsilon, v_prediction or sample")


def snr(noise_scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) per timestep, float32 [B]."""
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def loss_weights(noise_scheduler: SchedulerMixin, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Weight of each sample's loss, float32 [B]: 1, or min(SNR, gamma) in the prediction's own units."""
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    ratio = snr(noise_scheduler, timesteps)
    clipped = ratio.clamp(max=snr_gamma)
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return clipped / ratio
    return clipped / (ratio + 1) if kind == "v_prediction" else clipped


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
