"""Sections ``lora`` and ``train``: the adapter's shape, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.params import Params

BiasMode = Literal["none", "all", "lora_only"]


class InitFrom(Params):
    """An adapter to start from, pinned by its content."""

    path: str = Field(min_length=1, exclude=True)
    """A .safetensors file, tracked by DVC or git. Where it lies is no part of what decides a run."""
    sha256: str | None = None
    """Its digest; without it the stage stops and prints it."""


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
    """Which biases are trained as well: none, those of the adapted layers, or all of the denoiser's."""
    init_from: InitFrom | None
    """An adapter that this one starts from, in place of init_lora_weights."""

    def recorded(self) -> dict[str, Any]:
        """For whoever meets the adapter: init_from by its digest alone, and not at all where there is none."""
        return self.model_dump(exclude=set() if self.init_from else {"init_from"})

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
    """Share of captions replaced, by the empty one or, where SDXL's base says so, by zeros: for guidance."""
    checkpoint_every_n_steps: int = Field(ge=1)
    snapshot_every_n_steps: int = Field(ge=1)
    """Adapters kept for validate's curve and progress sheet."""
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def warmup_ends(self) -> TrainParams:
        if self.lr_warmup_steps >= self.num_steps:
            raise ValueError(f"lr_warmup_steps ({self.lr_warmup_steps}) must be below num_steps ({self.num_steps})")
        return self
