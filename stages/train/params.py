"""Section ``train``: how the adapter is trained."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from lora_dag.adapters.params import LoraParams, or_empty
from lora_dag.core.params import Params
from lora_dag.families.protocol import all_families
from stages.train.optimizer_table import OPTIMIZERS

if TYPE_CHECKING:
    from lora_dag.families.protocol import Family

LossWeighting = Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2"]
HuberSchedule = Literal["constant", "exponential", "snr"]


def known_or_dotted(name: str) -> str:
    """Refuse what is neither an optimizer's name nor can be a class in a package."""
    if name not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1) or OPTIMIZERS
        raise ValueError(f"got '{name}'; use {', '.join(near)}, or a class such as torch.optim.RAdam")
    return name


class TrainParams(Params):
    """Section ``train``. A step is an optimizer step everywhere."""

    num_steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=1)
    """Pictures per forward pass."""
    gradient_accumulation_steps: int = Field(ge=1, le=10**6)
    """Forward passes per step."""

    optimizer: Annotated[str, AfterValidator(known_or_dotted)]
    """A name of stages/train/optimizer_table.py, or a class of torch.optim's kind, such as ``torch.optim.RAdam``."""
    optimizer_args: dict[str, Any]
    """More arguments of that class, such as {betas: [0.9, 0.99]}."""
    learning_rate: float = Field(gt=0, le=1e6)
    scale_lr: bool
    """Multiply learning_rate by batch_size * gradient_accumulation_steps."""
    lora_plus_ratio: float | None = Field(ge=1, le=1e6)
    """B's learning rate over A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    weight_decay: float = Field(ge=0, le=1e6)
    text_encoder_lr: float | None = Field(gt=0, le=1e6)
    """Peak learning rate of the text encoders; null for ``learning_rate``."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    lr_warmup_steps: int = Field(ge=0)
    lr_num_cycles: int = Field(ge=1)
    """Of cosine_with_restarts."""
    lr_power: float = Field(gt=0)
    """Of polynomial."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are scaled down to this 2-norm over all adapter parameters."""

    loss_weighting: LossWeighting
    """Weight of a timestep's loss by its signal-to-noise ratio."""
    snr_gamma: float | None = Field(gt=0)
    """Of min_snr and soft_min_snr."""
    huber_c: float | None = Field(gt=0, le=1)
    """Pseudo-Huber instead of squared errors: where they turn from squared to linear; null for squared."""
    huber_schedule: HuberSchedule
    """How c falls from 1 without noise to huber_c at the most."""
    timestep_sampling: Literal["uniform", "logit_normal"]
    logit_mean: float
    logit_std: float = Field(gt=0)
    timestep_shift: Annotated[float, Field(gt=0)] | Literal["auto"]
    """s of s t / (1 + (s - 1) t); above 1 towards noise; auto as the scheduler shifts at the picture's size."""
    timestep_range: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)]
    """Shares of the schedule between which timesteps are drawn, 0 without noise."""
    noise_offset: float = Field(ge=0)
    """Standard deviation of a shift per channel that is added to the noise."""
    multires_noise_discount: float = Field(ge=0, lt=1)
    """Weight of each coarser noise below the last."""
    input_perturbation: float = Field(ge=0)
    """Standard deviation of noise that is added and not to be predicted."""
    prompt_dropout: float = Field(ge=0, le=1)
    """Share of captions replaced, by the empty one or, where SDXL's base says so, by zeros: for guidance."""

    ema_decay: float | None = Field(gt=0, lt=1)
    """The adapter that is kept is an exponential moving average of the trained one."""
    ema_power: float | None = Field(gt=0)
    """The average's decay rises as 1 - (1 + step) ** -power; null for (1 + step) / (10 + step)."""
    gradient_checkpointing: bool
    """Less memory for activations, more time."""
    compile: bool
    """torch.compile of the denoiser's repeated blocks."""
    checkpoint_every_n_steps: int = Field(ge=1)
    snapshot_every_n_steps: int = Field(ge=1)
    """Adapters kept for validate's curve and progress sheet."""
    early_stop_patience: int | None = Field(ge=1)
    """End after so many snapshots in a row without a lower held-out loss; null goes on to num_steps."""
    seed: int = Field(ge=0)

    _null = field_validator("optimizer_args", mode="before")(or_empty)

    def recorded(self, without: set[str]) -> dict[str, Any]:
        """For digests and headers: all but ``without``, and an early stop only where it is on."""
        return self.model_dump(exclude=without | (set() if self.early_stop_patience else {"early_stop_patience"}))

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps at which a snapshot is kept; the end is none of them."""
        return list(range(self.snapshot_every_n_steps, self.num_steps, self.snapshot_every_n_steps))

    @model_validator(mode="after")
    def settings_are_read(self) -> TrainParams:
        """What no other setting lets be read is refused."""
        try:
            json.dumps(self.optimizer_args, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"optimizer_args: got {self.optimizer_args}; numbers must be finite") from None
        if self.lr_warmup_steps >= self.num_steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must be below num_steps ({self.num_steps})")
        needs_gamma = self.loss_weighting in ("min_snr", "soft_min_snr")
        if needs_gamma != (self.snr_gamma is not None):
            what = "needs" if needs_gamma else "does not read"
            raise ValueError(f"loss_weighting {self.loss_weighting} {what} snr_gamma; got {self.snr_gamma}")
        if self.huber_c is None and self.huber_schedule != "constant":
            raise ValueError(f"huber_schedule {self.huber_schedule} needs huber_c, such as 0.1")
        if self.timestep_sampling == "uniform" and (self.logit_mean, self.logit_std) != (0, 1):
            raise ValueError("logit_mean and logit_std need timestep_sampling: logit_normal")
        if self.timestep_range[0] >= self.timestep_range[1]:
            raise ValueError(f"timestep_range {self.timestep_range} is empty; use [0.0, 1.0] for all")
        if (self.early_stop_patience or 0) >= max(1, len(self.snapshot_steps)):
            few = f"the number of snapshots ({len(self.snapshot_steps)})"
            raise ValueError(
                f"early_stop_patience ({self.early_stop_patience}) must be below {few}, or nothing ends early"
            )
        if self.ema_power is not None and self.ema_decay is None:
            raise ValueError("ema_power needs ema_decay, such as 0.999")
        if self.lr_num_cycles != 1 and self.lr_scheduler != "cosine_with_restarts":
            raise ValueError("lr_num_cycles needs lr_scheduler: cosine_with_restarts")
        if self.lr_power != 1 and self.lr_scheduler != "polynomial":
            raise ValueError("lr_power needs lr_scheduler: polynomial")
        return self


def cross_problems(lora: LoraParams, train: TrainParams, family: Family) -> list[str]:
    """A line for text encoders that the family does not offer or that init_from does not fill; for idle rates."""
    if train.lora_plus_ratio is not None and lora.algo != "lora":
        found = f"{train.lora_plus_ratio:g} is B's rate over A's, which lora.algo {lora.algo} does not have"
        return [f"params.yaml train.lora_plus_ratio: {found}; set it to null"]
    if not lora.train_text_encoder and train.text_encoder_lr is not None:
        ignored = f"{train.text_encoder_lr:g} is ignored without lora.train_text_encoder; set that, or null here"
        return [f"params.yaml train.text_encoder_lr: {ignored}"]
    if lora.train_text_encoder and lora.init_from:
        return ["params.yaml lora.init_from: fills no text encoders; set it to null, or train_text_encoder to false"]
    if not lora.train_text_encoder or family.TEXT_ENCODERS:
        return []
    offering = [name for name, other in all_families().items() if other.TEXT_ENCODERS]
    found = f"no text encoder of {family.PIPELINE} can be trained, those of {', '.join(offering)} can"
    return [f"params.yaml lora.train_text_encoder: {found}; set it to false"]
