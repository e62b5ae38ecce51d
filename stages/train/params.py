"""Sections ``lora`` and ``train``: the adapter's shape, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.base_files import FAMILIES
from stages.core.params import Params
from stages.families.base import load_family

if TYPE_CHECKING:
    from stages.families.base import Family

BiasMode = Literal["none", "all", "lora_only"]


class LoraParams(Params):
    """Section ``lora``: the adapter's shape."""

    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(ge=0, lt=1)
    """Share of the adapter's inputs dropped in training."""
    target_modules: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    """A preset's name, a list of endings of module names such as to_q, or one regex over whole names."""
    exclude_modules: list[str]
    """Endings of targets that are left out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]]
    """Ending (or regex) -> rank, where it differs."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    """Ending (or regex) -> alpha, where it differs."""
    use_rslora: bool
    """The update is scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool
    """Magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: Literal["gaussian", "kaiming"]
    """How A starts; B starts at zero, so that step 0 equals the base."""

    bias: BiasMode
    """Which of the denoiser's biases are trained as well: none, those of the adapted layers, or all."""
    train_text_encoder: bool
    """Also adapt the attention of the CLIP text encoders: same rank, alpha, dropout and kind, no biases."""

    LATER = {"train_text_encoder": False}

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def patterns_compile(cls, value: str | Iterable[str]) -> str | Iterable[str]:
        for pattern in [value] if isinstance(value, str) else value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"got '{pattern}', no regular expression ({error})") from None
        return value


class TrainParams(Params):
    """Section ``train``. A step is an optimizer step everywhere."""

    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Pictures per forward pass."""
    gradient_accumulation_steps: int = Field(ge=1)
    """Forward passes per step."""
    learning_rate: float = Field(gt=0)
    text_encoder_lr: float | None = Field(gt=0)
    """Peak learning rate of the text encoders; null for ``learning_rate``."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    lr_warmup_steps: int = Field(ge=0)
    adam_beta1: float = Field(ge=0, lt=1)
    adam_beta2: float = Field(ge=0, lt=1)
    adam_weight_decay: float = Field(ge=0)
    adam_epsilon: float = Field(gt=0)
    max_grad_norm: float = Field(gt=0)
    """Gradients are scaled down to this 2-norm over all adapter parameters."""
    snr_gamma: float | None = Field(gt=0)
    """min-SNR gamma, null for uniform weights."""
    prompt_dropout: float = Field(ge=0, le=1)
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    checkpoint_every_n_steps: int = Field(ge=1)
    snapshot_every_n_steps: int = Field(ge=1)
    """Adapters kept for validate's curve and progress sheet."""
    seed: int = Field(ge=0)

    LATER = {"text_encoder_lr": None}

    @model_validator(mode="after")
    def warmup_ends(self) -> TrainParams:
        if self.lr_warmup_steps >= self.num_steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must be below num_steps ({self.num_steps})")
        return self


def text_problems(lora: LoraParams, train: TrainParams, family: Family) -> list[str]:
    """A line for text encoders that the family does not offer, or for a rate that would be ignored."""
    if not lora.train_text_encoder and train.text_encoder_lr is not None:
        ignored = f"{train.text_encoder_lr:g} is ignored without lora.train_text_encoder; set that, or null here"
        return [f"params.yaml train.text_encoder_lr: {ignored}"]
    if not lora.train_text_encoder or family.TEXT_ENCODERS:
        return []
    offering = [name for name in FAMILIES.values() if load_family(name).TEXT_ENCODERS]
    found = f"no text encoder of {family.PIPELINE} can be trained, those of {', '.join(offering)} can"
    return [f"params.yaml lora.train_text_encoder: {found}; set it to false"]
