"""Section ``train``: settings of the training."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from lora_dag.adapters.params import LoraParams, none_to_empty
from lora_dag.core.console import Problem
from lora_dag.core.params import Params
from lora_dag.core.setting_problem import setting_problem
from lora_dag.families.protocol import all_families
from stages.train.optimizer_table import OPTIMIZERS

if TYPE_CHECKING:
    from lora_dag.families.protocol import Family

LossWeighting = Literal["uniform", "min_snr", "soft_min_snr", "debiased", "p2"]
HuberSchedule = Literal["constant", "exponential", "snr"]


def require_optimizer_name(name: str) -> str:
    """Require the name of an optimizer, or the dotted path of a class."""
    if name not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1) or OPTIMIZERS
        text = f"got '{name}'. Use {', '.join(near)}, or a class such as torch.optim.RAdam."
        raise setting_problem("unknown-optimizer", text)
    return name


class TrainParams(Params):
    """Section ``train``. A step is always an optimizer step."""

    num_steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=1)
    """Images per forward pass."""
    gradient_accumulation_steps: int = Field(ge=1, le=10**6)
    """Forward passes per step."""

    optimizer: Annotated[str, AfterValidator(require_optimizer_name)]
    """adamw, adamw_8bit, adafactor, lion, prodigy, schedule_free, or a subclass of torch.optim.Optimizer such as
    ``torch.optim.RAdam``."""
    optimizer_args: dict[str, Any]
    """More arguments of the optimizer, such as {betas: [0.9, 0.99]}."""
    learning_rate: float = Field(gt=0, le=1e6)
    scale_lr: bool
    """Multiply learning_rate by batch_size * gradient_accumulation_steps."""
    lora_plus_ratio: float | None = Field(ge=1, le=1e6)
    """Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    weight_decay: float = Field(ge=0, le=1e6)
    text_encoder_lr: float | None = Field(gt=0, le=1e6)
    """Peak learning rate of the text encoders; null for ``learning_rate``."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    lr_warmup_steps: int = Field(ge=0)
    lr_num_cycles: int = Field(ge=1)
    """Number of cycles of cosine_with_restarts."""
    lr_power: float = Field(gt=0)
    """Exponent of polynomial."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are clipped to this 2-norm over all trained parameters."""

    loss_weighting: LossWeighting
    """Weight of a timestep's loss as a function of its signal-to-noise ratio."""
    snr_gamma: float | None = Field(gt=0)
    """Gamma of min_snr and soft_min_snr."""
    huber_c: float | None = Field(gt=0, le=1)
    """Pseudo-Huber loss with this c, where it changes from squared to linear; null for squared errors."""
    huber_schedule: HuberSchedule
    """Schedule by which c falls from 1 without noise to huber_c at full noise."""
    timestep_sampling: Literal["uniform", "logit_normal"]
    logit_mean: float
    logit_std: float = Field(gt=0)
    timestep_shift: Annotated[float, Field(gt=0)] | Literal["auto"]
    """s in t -> s t / (1 + (s - 1) t); above 1: more noise; auto: the scheduler's shift for the image size."""
    timestep_range: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)]
    """Part of the schedule from which timesteps are drawn: 0 is no noise, 1 is full noise."""
    noise_offset: float = Field(ge=0)
    """Standard deviation of a random shift per channel that is added to the noise."""
    multires_noise_discount: float = Field(ge=0, lt=1)
    """Factor of each coarser noise relative to the previous one; 0 disables multi-resolution noise."""
    input_perturbation: float = Field(ge=0)
    """Standard deviation of extra noise in the input that is not part of the target."""
    prompt_dropout: float = Field(ge=0, le=1)
    """Fraction of captions replaced by the empty caption (zeros for some SDXL bases), for guidance."""

    ema_decay: float | None = Field(gt=0, lt=1)
    """Decay of the exponential moving average (EMA) that is saved; null saves the trained weights."""
    ema_power: float | None = Field(gt=0)
    """The EMA decay rises as 1 - (1 + step) ** -power; null for (1 + step) / (10 + step)."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    compile: bool
    """Compile the denoiser's repeated blocks by torch.compile."""
    checkpoint_every_n_steps: int = Field(ge=1)
    snapshot_every_n_steps: int = Field(ge=1)
    """Interval of the adapters that are kept for validate's loss curve and progress sheet."""
    early_stop_patience: int | None = Field(ge=1)
    """Stop after this many snapshots in a row without a lower held-out loss; null trains num_steps."""
    seed: int = Field(ge=0)

    _null = field_validator("optimizer_args", mode="before")(none_to_empty)

    def recorded(self, without: set[str]) -> dict[str, Any]:
        """Return the settings for digests and headers: all but ``without``, and the early stop only if it is set."""
        return self.model_dump(exclude=without | (set() if self.early_stop_patience else {"early_stop_patience"}))

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps with a snapshot, without the last step."""
        return list(range(self.snapshot_every_n_steps, self.num_steps, self.snapshot_every_n_steps))

    @model_validator(mode="after")
    def reject_contradictions(self) -> TrainParams:
        """Reject values that are impossible, or that need another setting."""
        try:
            json.dumps(self.optimizer_args, allow_nan=False)
        except (TypeError, ValueError):
            text = f"got {self.optimizer_args}, but finite numbers are expected. Correct them."
            raise setting_problem("wrong-value", text, "optimizer_args") from None
        if self.lr_warmup_steps >= self.num_steps:
            text = f"got {self.lr_warmup_steps}, but fewer than num_steps ({self.num_steps}) are expected. Lower it."
            raise setting_problem("warmup-too-long", text, "lr_warmup_steps")
        if self.needs_gamma and self.snr_gamma is None:
            text = f"got null, but loss_weighting {self.loss_weighting} needs a number. Set it, for example to 5.0."
            raise setting_problem("missing-setting", text, "snr_gamma")
        if self.huber_c is None and self.huber_schedule != "constant":
            text = f"got null, but huber_schedule {self.huber_schedule} needs a number. Set it, for example to 0.1."
            raise setting_problem("missing-setting", text, "huber_c")
        if self.ema_power is not None and self.ema_decay is None:
            text = f"got null, but ema_power {self.ema_power:g} needs a number. Set it, for example to 0.999."
            raise setting_problem("missing-setting", text, "ema_decay")
        if self.timestep_range[0] >= self.timestep_range[1]:
            text = f"got {self.timestep_range}, which is empty. Use [0.0, 1.0] for all timesteps."
            raise setting_problem("empty-timestep-range", text, "timestep_range")
        num_snapshots = len(self.snapshot_steps)
        if (self.early_stop_patience or 0) >= max(1, num_snapshots):
            fewer = f"fewer than the number of snapshots ({num_snapshots})"
            text = f"got {self.early_stop_patience}, but {fewer} are expected. Lower it, or set it to null."
            raise setting_problem("patience-too-long", text, "early_stop_patience")
        return self

    @model_validator(mode="after")
    def reject_ignored_settings(self) -> TrainParams:
        """Reject settings that would have no effect because of another setting."""
        if not self.needs_gamma and self.snr_gamma is not None:
            text = f"{self.snr_gamma} has no effect with loss_weighting {self.loss_weighting}. Set it to null."
            raise setting_problem("setting-ignored", text, "snr_gamma")
        if self.timestep_sampling == "uniform" and (self.logit_mean, self.logit_std) != (0, 1):
            key, default = ("logit_mean", 0) if self.logit_mean else ("logit_std", 1)
            text = f"{getattr(self, key)} has no effect with timestep_sampling uniform. Use logit_normal, or {default}."
            raise setting_problem("setting-ignored", text, key)
        if self.lr_num_cycles != 1 and self.lr_scheduler != "cosine_with_restarts":
            text = f"{self.lr_num_cycles} has no effect with lr_scheduler {self.lr_scheduler}. Set it to 1."
            raise setting_problem("setting-ignored", text, "lr_num_cycles")
        if self.lr_power != 1 and self.lr_scheduler != "polynomial":
            text = f"{self.lr_power:g} has no effect with lr_scheduler {self.lr_scheduler}. Set it to 1."
            raise setting_problem("setting-ignored", text, "lr_power")
        return self

    @property
    def needs_gamma(self) -> bool:
        return self.loss_weighting in ("min_snr", "soft_min_snr")


def cross_problems(lora: LoraParams, train: TrainParams, family: Family) -> list[Problem]:
    """Return the problem of settings of sections ``lora`` and ``train`` that do not fit together or the family."""
    if train.lora_plus_ratio is not None and lora.algo != "lora":
        text = f"got {train.lora_plus_ratio:g}, but lora.algo {lora.algo} has no A and B. Set it to null."
        return [Problem("setting-ignored", f"{train.setting('lora_plus_ratio')}: {text}")]
    if not lora.train_text_encoder and train.text_encoder_lr is not None:
        text = f"got {train.text_encoder_lr:g}, but lora.train_text_encoder is false. Set it to null."
        return [Problem("setting-ignored", f"{train.setting('text_encoder_lr')}: {text}")]
    if lora.train_text_encoder and lora.init_from:
        text = "a file cannot start adapters of text encoders. Set it to null, or lora.train_text_encoder to false."
        return [Problem("init-from-text-encoder", f"{lora.setting('init_from')}: {text}")]
    if not lora.train_text_encoder or family.TEXT_ENCODERS:
        return []
    names = ", ".join(name for name, other in all_families().items() if other.TEXT_ENCODERS)
    text = f"{family.PIPELINE} has no trainable text encoder (families with one: {names}). Set it to false."
    return [Problem("no-trainable-text-encoder", f"{lora.setting('train_text_encoder')}: {text}")]
