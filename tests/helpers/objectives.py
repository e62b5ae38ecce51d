"""Targets by the papers' formulas in float64, and what they are computed of."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler

NUM_TRAIN_TIMESTEPS = 1000
BETAS = (0.00085, 0.012)
KINDS = ("epsilon", "v_prediction", "sample")
TIMESTEPS = ([0], [999], [0, 1, 250, 500, 998, 999])


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(
        NUM_TRAIN_TIMESTEPS,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="scaled_linear",
        prediction_type=kind,
    )


def alpha_bar(timesteps: list[int]) -> np.ndarray:
    """Ho et al. 2020, eq. 4, for Stable Diffusion's betas; float64 [B]."""
    betas = np.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, NUM_TRAIN_TIMESTEPS) ** 2
    return np.cumprod(1 - betas)[timesteps]


def draws(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise, float32 [B, 4, 3, 5]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 4, 3, 5, generator=generator), torch.randn(count, 4, 3, 5, generator=generator)


def reference_target(kind: str, latents: np.ndarray, noise: np.ndarray, timesteps: list[int]) -> np.ndarray:
    signal = alpha_bar(timesteps)[:, None, None, None]
    return {
        "epsilon": noise,
        "v_prediction": np.sqrt(signal) * noise - np.sqrt(1 - signal) * latents,
        "sample": latents,
    }[kind]


def zero_snr(kind: str) -> DDPMScheduler:
    return DDPMScheduler.from_config(scheduler(kind).config, rescale_betas_zero_snr=True)
