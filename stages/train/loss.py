"""Training loss: squared or pseudo-Huber error of a prediction, weighted by the timestep's signal-to-noise ratio.

A weighting defines the weight of an error in the clean latents for each signal-to-noise ratio. The same error has
another size in the prediction (``squared_error`` of the objective); the weight of the loss is divided by that size.

Sources: min-SNR, Hang et al. 2023 (arXiv:2303.09556) eq. 8 and section 3.4: min(SNR, gamma). Soft min-SNR, Crowson et
al. 2024 (arXiv:2401.11605): 1 / (1 / SNR + 1 / gamma). Debiased estimation, Yu et al. 2023 (arXiv:2310.08442):
SNR ** -0.5 on epsilon. P2, Choi et al. 2022 (arXiv:2204.00227) eq. 8 with k = gamma = 1: 1 / (1 + SNR) on epsilon.
Pseudo-Huber and its schedules, Khrapov et al. 2024 (arXiv:2403.16728); the snr schedule as in kohya's trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_dag.core.console import Problem, UserError
from lora_dag.diffusion.objectives import Epsilon, HasSnr, masked_mean, prediction_type

if TYPE_CHECKING:
    from lora_dag.diffusion.objectives import Objective
    from stages.train.batches import Batch
    from stages.train.params import TrainParams

WEIGHTINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "min_snr": torch.minimum,
    "soft_min_snr": lambda snr, gamma: snr * gamma / (snr + gamma),
    "debiased": lambda snr, gamma: snr.sqrt(),
    "p2": lambda snr, gamma: snr / (1 + snr),
}
"""Weighting -> function of SNR [B] and gamma [] that returns the weight of an error in the clean latents, [B]."""


@dataclass(frozen=True)
class Loss:
    """Loss of section ``train`` for an objective.

    Raises:
        UserError: a setting needs a signal-to-noise ratio that the objective does not have.
    """

    objective: Objective
    params: TrainParams

    def __post_init__(self) -> None:
        require_snr(self.objective, self.params)

    def __call__(self, model_pred: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the loss of each sample, float32 [B]."""
        target = self.objective.target(batch.latents, batch.noise, batch.timesteps)  # [B, C, h, w]
        errors = elementwise_errors(model_pred.float(), target, self.huber_c(batch.timesteps))  # [B, C, h, w]
        return masked_mean(errors, batch.masks) * self.weights(batch.timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the weight of each sample's loss, float32 [B]; 1 for ``uniform``."""
        if self.params.loss_weighting == "uniform":
            return torch.ones_like(timesteps, dtype=torch.float32)
        assert isinstance(self.objective, HasSnr)  # checked by require_snr
        snr = self.objective.snr(timesteps)
        weights = WEIGHTINGS[self.params.loss_weighting](snr, torch.tensor(self.params.snr_gamma or 0.0))
        return (weights / self.objective.squared_error(snr)).nan_to_num(1.0)  # 0 / 0: epsilon at zero terminal SNR

    def huber_c(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Return pseudo-Huber's c of each sample, [B]; from 1 without noise to ``huber_c``, or constant."""
        c, schedule = self.params.huber_c, self.params.huber_schedule
        if c is None:
            return None
        if schedule == "exponential":
            return c ** (timesteps.float() / self.objective.noise_scheduler.config.num_train_timesteps)
        if schedule == "snr":
            assert isinstance(self.objective, HasSnr)  # checked by require_snr
            noise_to_signal = self.objective.snr(timesteps).rsqrt()
            return (1 - c) / (1 + noise_to_signal) ** 2 + c
        return torch.full_like(timesteps, c, dtype=torch.float32)


def elementwise_errors(model_pred: torch.Tensor, target: torch.Tensor, huber_c: torch.Tensor | None) -> torch.Tensor:
    """Return (x - y)^2 of each value, or pseudo-Huber's 2 c (sqrt((x - y)^2 + c^2) - c), [B, C, h, w].

    Args:
        huber_c: [B]; None for squared errors.
    """
    squared = (model_pred - target).square()
    if huber_c is None:
        return squared
    c = huber_c[:, None, None, None]
    return 2 * c * ((squared + c**2).sqrt() - c)


def require_snr(objective: Objective, params: TrainParams) -> None:
    """Raise UserError if a setting needs a signal-to-noise ratio that the objective does not have."""
    problems = []
    noise_scheduler = objective.noise_scheduler
    weighting, schedule = params.setting("loss_weighting"), params.setting("huber_schedule")
    if not isinstance(objective, HasSnr):
        reason = f"needs a signal-to-noise ratio, but {prediction_type(noise_scheduler)} has none"
        if params.loss_weighting != "uniform":
            problems.append(Problem("needs-snr", f"{weighting}: {params.loss_weighting} {reason}. Use uniform."))
        if params.huber_schedule == "snr":
            problems.append(Problem("needs-snr", f"{schedule}: snr {reason}. Use exponential or constant."))
    elif params.loss_weighting == "debiased" and isinstance(objective, Epsilon):
        last = torch.tensor([noise_scheduler.config.num_train_timesteps - 1])
        if not objective.snr(last).all():
            text = "debiased has no finite weight for epsilon at zero terminal SNR. Use soft_min_snr with snr_gamma."
            problems.append(Problem("weight-not-finite", f"{weighting}: {text}"))
    if problems:
        raise UserError(*problems)
