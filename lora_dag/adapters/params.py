"""Section ``lora``: the adapter's shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lora_dag.core.params import HomePath, Params

BiasMode = Literal["none", "all", "lora_only"]
OF_LORA = {
    "dropout": 0,
    "init_lora_weights": "kaiming",
    "init_from": None,
    "train_text_encoder": False,
    "use_rslora": False,
    "use_dora": False,
}
"""Settings that PEFT has for LoRA alone, and what they must be elsewhere."""
OF_LYCORIS = {"decompose_factor": None, "decompose_both": False, "use_effective_conv2d": False}
"""Settings that LoRA does not have, and what they must be there."""


def or_empty(value: Any) -> Any:
    """null is no entry: in params.yaml it, unlike ``{}``, can be replaced by ``dvc exp run -S``."""
    return {} if value is None else value


class InitFrom(Params):
    """An adapter to start from, pinned by its content."""

    path: HomePath = Field(exclude=True)
    """A .safetensors file, tracked by DVC or git. Where it lies is no part of what decides a run."""
    sha256: str | None = None
    """Its digest; without it the stage stops and prints it."""


class LoraParams(Params):
    """Section ``lora``: the adapter's shape."""

    algo: Literal["lora", "lokr", "loha"]
    """What is added to a weight: B A, a Kronecker or a Hadamard product (Yeh et al. 2023, arXiv:2309.14859)."""
    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / rank; null in the file is each layer's own rank: ``with_alphas``."""
    dropout: float = Field(ge=0, lt=1)
    """Share of the adapter's inputs dropped in training."""
    target_modules: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    """A preset's name, a list of endings of module names such as to_q, or one regex over whole names."""
    exclude_modules: list[str]
    """Endings of targets that are left out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]]
    """Ending (or regex) -> rank, where it differs; null for none, which `dvc exp run -S` can replace."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    """Ending (or regex) -> alpha, where it differs."""
    use_rslora: bool
    """The update is scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool
    """Magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: Literal["gaussian", "kaiming", "eva"]
    """How A starts; B starts at zero, so that step 0 equals the base. eva: stages/train/eva.py."""

    bias: BiasMode
    """Which of the denoiser's biases are trained as well: none, those of the adapted layers, or all."""
    train_text_encoder: bool
    """Also adapt the attention of the CLIP text encoders: same rank, alpha, dropout and kind, no biases."""
    init_from: InitFrom | None
    """An adapter that this one starts from, in place of init_lora_weights."""

    decompose_factor: int | None = Field(ge=1)
    """LoKr: sides of the first factor, or the nearest divisors below; null for those nearest the square root."""
    decompose_both: bool
    """LoKr: the first factor is a product of the rank too, where that is smaller."""
    use_effective_conv2d: bool
    """Kernels above 1 x 1 in Tucker form (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098, proposition 3)."""

    _null = field_validator("rank_pattern", "alpha_pattern", mode="before")(or_empty)

    @model_validator(mode="before")
    @classmethod
    def null_alpha_is_the_rank(cls, values: Any) -> Any:
        return with_alphas(values) if isinstance(values, dict) else values

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def patterns_compile(cls, value: str | Iterable[str], info: ValidationInfo) -> str | Iterable[str]:
        if info.field_name == "alpha_pattern" and "rank_pattern" not in info.data:  # refused, and may be part of it
            return value
        for pattern in [value] if isinstance(value, str) else value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"got '{pattern}', no regular expression ({error})") from None
        return value

    @field_validator(*OF_LORA, *OF_LYCORIS)
    @classmethod
    def has_a_meaning(cls, value: Any, info: ValidationInfo) -> Any:
        """Each setting is one of this algorithm's, or off."""
        algo, name = str(info.data.get("algo")), str(info.field_name)
        off = OF_LYCORIS[name] if name in OF_LYCORIS else OF_LORA[name]
        has: dict[str, Iterable[str]] = {"lora": OF_LORA, "lokr": OF_LYCORIS, "loha": ["use_effective_conv2d"]}
        if name not in has.get(algo, [name]) and value != off:
            given, wanted = (json.dumps(text, default=lambda start: start.path).strip('"') for text in (value, off))
            raise ValueError(f"got {given}, which lora.algo {algo} does not have; use {wanted}")
        return value


def with_alphas(lora: dict[str, Any]) -> dict[str, Any]:
    """Section ``lora``, unchecked, with numbers for ``alpha: null``: each layer's own rank, so that its strength is 1.

    A layer of ``rank_pattern`` has the alpha of its rank there, unless ``alpha_pattern`` has the same key.
    """
    if lora.get("alpha", 1) is not None:
        return lora
    rank, ranks, alphas = (or_empty(lora.get(name)) for name in ("rank", "rank_pattern", "alpha_pattern"))
    if isinstance(ranks, dict) and isinstance(alphas, dict):
        lora = lora | {"alpha_pattern": {key: value for key, value in ranks.items() if is_rank(value)} | alphas}
    return lora | {"alpha": rank if is_rank(rank) else 1}


def is_rank(value: Any) -> bool:
    """Another value is refused as a rank, and need not be refused as an alpha too."""
    return type(value) is int and value > 0
