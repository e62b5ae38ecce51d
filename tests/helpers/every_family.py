"""Overrides for a family's tiny base, and its loss by stock classes alone."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from stages.validate.heldout_loss import row_noise
from tests.helpers.families import Stock


def overrides(name: str, *more: str) -> list[str]:
    changes = (f"model.family={name}", "train.num_steps=3", *more)
    return [word for change in changes for word in ("--set", change)]


def stock_loss(pipe: Any, stock: Stock, image: Any, row: Any, seed: int) -> float:
    config = pipe.vae.config
    latents = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mean
    latents = (latents - (config.shift_factor or 0)) * config.scaling_factor
    noise = row_noise(seed, row, latents.shape[1:])[None]
    given = stock.encode(pipe, [row.image.caption])
    given["add_time_ids"] = torch.tensor([[48.0, 48, 0, 0, 32, 32]])
    if hasattr(pipe.scheduler, "scale_noise"):  # flow matching; the schedule runs from noise to image
        timesteps = pipe.scheduler.timesteps[[-1 - row.timestep]]
        noisy, target = pipe.scheduler.scale_noise(latents, timesteps, noise), noise - latents
    else:
        timesteps = torch.tensor([row.timestep])
        noisy, target = pipe.scheduler.add_noise(latents, noise, timesteps), noise
        if pipe.scheduler.config.prediction_type == "v_prediction":
            target = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).get_velocity(latents, noise, timesteps)
    return float((stock.call(pipe, noisy, timesteps, given) - target).square().mean())
