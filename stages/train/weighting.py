"""How an error becomes a loss: squared or pseudo-Huber, weighed by the timestep's noise.

A weighting says what an error in the clean latents counts at each signal-to-noise ratio. The same error is SNR times as
large in epsilon and SNR + 1 times in v (squared), so the weight there is divided by that.

Sources: min-SNR, Hang et al. 2023 (arXiv:2303.09556) eq. 8 and section 3.4: min(SNR, gamma). Soft min-SNR, Crowson et
al. 2024 (arXiv:2401.11605): 1 / (1 / SNR + 1 / gamma). Debiased estimation, Yu et al. 2023 (arXiv:2310.08442):
SNR ** -0.5 on epsilon. P2, Choi et al. 2022 (arXiv:2204.00227) eq. 8 with k = gamma = 1: 1 / (1 + SNR) on epsilon.
Pseudo-Huber and its schedules, Khrapov et al. 2024 (arXiv:2403.16728); the snr schedule as kohya's trainer has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_dag.core.console import UserError
from lora_dag.diffusion.objectives import prediction_type

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from stages.train.params import HuberSchedule, LossWeighting, TrainParams


def snr(noise_scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) per timestep, float32 [B]."""
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def loss_weights(
    noise_scheduler: SchedulerMixin, timesteps: torch.Tensor, weighting: LossWeighting, snr_gamma: float | None
) -> torch.Tensor:
    """Weight of each sample's loss, float32 [B], in the prediction's own units; 1 where ``uniform``."""
    if weighting == "uniform":
        return torch.ones_like(timesteps, dtype=torch.float32)
    ratio = snr(noise_scheduler, timesteps)
    gamma = torch.tensor(snr_gamma or 0.0)
    weights = {
        "min_snr": torch.minimum(ratio, gamma),
        "soft_min_snr": ratio * gamma / (ratio + gamma),
        "debiased": ratio.sqrt(),
        "p2": ratio / (1 + ratio),
    }[weighting]
    kind = prediction_type(noise_scheduler)
    if kind == "epsilon":
        return (weights / ratio).nan_to_num(1.0)  # 0 / 0 at zero terminal SNR
    return weights / (ratio + 1) if kind == "v_prediction" else weights


def errors(model_pred: torch.Tensor, target: torch.Tensor, huber_c: torch.Tensor | None) -> torch.Tensor:
    """Of each value, [B, C, h, w]: (x - y)^2, or pseudo-Huber's 2 c (sqrt((x - y)^2 + c^2) - c).

    Args:
        huber_c: [B]; None for squared errors.
    """
    squared = (model_pred - target).square()
    if huber_c is None:
        return squared
    c = huber_c[:, None, None, None]
    return 2 * c * ((squared + c**2).sqrt() - c)


def huber_c(
    noise_scheduler: SchedulerMixin, timesteps: torch.Tensor, c: float | None, schedule: HuberSchedule
) -> torch.Tensor | None:
    """Pseudo-Huber's c per sample, [B]: 1 without noise falling to ``c``; ``c`` throughout where ``constant``."""
    if c is None:
        return None
    if schedule == "snr":
        noise_to_signal = snr(noise_scheduler, timesteps).rsqrt()
        return (1 - c) / (1 + noise_to_signal) ** 2 + c
    if schedule == "exponential":
        return c ** (timesteps.float() / noise_scheduler.config.num_train_timesteps)
    return torch.full_like(timesteps, c, dtype=torch.float32)


def require_snr(noise_scheduler: SchedulerMixin, params: TrainParams) -> None:
    """Raises UserError for a setting that asks for a diffusion's signal-to-noise ratio where there is none."""
    found = []
    name = type(noise_scheduler).__name__
    if prediction_type(noise_scheduler) == "flow_prediction":
        if params.loss_weighting != "uniform":
            line = f"{params.loss_weighting} weighs diffusion losses, and the base's {name} is flow matching"
            found.append(f"params.yaml train.loss_weighting: {line}; use uniform")
        if params.huber_schedule == "snr":
            line = f"snr is of diffusion, and the base's {name} is flow matching"
            found.append(f"params.yaml train.huber_schedule: {line}; use exponential or constant")
    elif params.loss_weighting == "debiased" and prediction_type(noise_scheduler) == "epsilon":
        last = torch.tensor([noise_scheduler.config.num_train_timesteps - 1])
        if not snr(noise_scheduler, last).all():
            line = "debiased grows without bound at zero terminal SNR with epsilon"
            found.append(f"params.yaml train.loss_weighting: {line}; use soft_min_snr with snr_gamma")
    if found:
        raise UserError(*found)
