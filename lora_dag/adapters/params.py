"""Section ``lora``: kind, size and layers of the adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lora_dag.core.params import HomePath, Params
from lora_dag.core.setting_problem import setting_problem

BiasMode = Literal["none", "all", "lora_only"]
LORA_ONLY = {
    "dropout": 0,
    "init_lora_weights": "kaiming",
    "init_from": None,
    "train_text_encoder": False,
    "use_rslora": False,
    "use_dora": False,
}
"""Settings that PEFT has for LoRA only -> their value for the other algorithms."""
LYCORIS_ONLY = {"decompose_factor": None, "decompose_both": False, "use_effective_conv2d": False}
"""Settings that LoRA does not have -> their value for LoRA."""


def none_to_empty(value: Any) -> Any:
    """Replace null by an empty dict: ``dvc exp run -S`` can override null in params.yaml, but not ``{}``."""
    return {} if value is None else value


class InitFrom(Params):
    """Adapter to start from, pinned by its content."""

    path: HomePath = Field(exclude=True)
    """A .safetensors file, tracked by DVC or git. The path does not count as an input of the run; the content does."""
    sha256: str | None = None
    """Digest of the file. Without it the stage stops and prints it."""


class LoraParams(Params):
    """Section ``lora``: kind, size and layers of the adapter."""

    algo: Literal["lora", "lokr", "loha"]
    """Change of a weight: B A, a Kronecker or a Hadamard product (Yeh et al. 2023, arXiv:2309.14859)."""
    rank: int = Field(ge=1, le=1024)
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / rank. null: the rank of each layer, so that the scale is 1."""
    dropout: float = Field(ge=0, lt=1)
    """Fraction of the adapter's inputs that is dropped in training."""
    target_modules: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    """A preset, a list of endings of module names such as to_q, or one regex over whole names."""
    exclude_modules: list[str]
    """Endings of targets that are left out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]]
    """Ending (or regex) -> rank of layers that differ; null for none, which `dvc exp run -S` can override."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    """Ending (or regex) -> alpha of layers that differ."""
    use_rslora: bool
    """Scale the update by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool
    """Train magnitude and direction of the weights separately (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: Literal["gaussian", "kaiming", "eva"]
    """Initialization of A; eva uses the training data (arXiv:2410.07170). B is zero, so that step 0 equals the base."""

    bias: BiasMode
    """Trained biases of the denoiser: none, the biases of the adapted layers, or all."""
    train_text_encoder: bool
    """Also adapt the attention of the CLIP text encoders, with the same rank, alpha, dropout and kind."""
    init_from: InitFrom | None
    """Adapter to start from, instead of init_lora_weights."""

    decompose_factor: int | None = Field(ge=1)
    """LoKr: size of the first factor, or the nearest divisor below; null for the divisor nearest the square root."""
    decompose_both: bool
    """LoKr: the first factor is a low-rank product too, where that is smaller."""
    use_effective_conv2d: bool
    """Kernels above 1 x 1 in Tucker form (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098, proposition 3)."""

    _null = field_validator("rank_pattern", "alpha_pattern", mode="before")(none_to_empty)

    @model_validator(mode="before")
    @classmethod
    def replace_null_alpha(cls, values: Any) -> Any:
        return with_alphas(values) if isinstance(values, dict) else values

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def patterns_compile(cls, value: str | Iterable[str], info: ValidationInfo) -> str | Iterable[str]:
        """Reject patterns that are no regular expression."""
        if info.field_name == "alpha_pattern" and "rank_pattern" not in info.data:
            return value  # rank_pattern is invalid, and alpha_pattern may be derived from it
        for pattern in [value] if isinstance(value, str) else value:
            try:
                re.compile(pattern)
            except re.error as error:
                text = f"got '{pattern}', which is no regular expression ({error}). Correct the pattern."
                raise setting_problem("no-regex", text) from None
        return value

    @field_validator(*LORA_ONLY, *LYCORIS_ONLY)
    @classmethod
    def setting_fits_algo(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject a setting that this algorithm does not have, unless it is off."""
        algo, name = str(info.data.get("algo")), str(info.field_name)
        off = LYCORIS_ONLY[name] if name in LYCORIS_ONLY else LORA_ONLY[name]
        has: dict[str, Iterable[str]] = {"lora": LORA_ONLY, "lokr": LYCORIS_ONLY, "loha": ["use_effective_conv2d"]}
        if name not in has.get(algo, [name]) and value != off:
            given, expected = (json.dumps(text, default=lambda start: start.path).strip('"') for text in (value, off))
            text = f"got {given}, but lora.algo {algo} has no such setting. Use {expected}."
            raise setting_problem("setting-of-other-algo", text)
        return value


def with_alphas(lora: dict[str, Any]) -> dict[str, Any]:
    """Replace ``alpha: null`` in the unchecked section ``lora`` by each layer's rank, so that its strength is 1.

    A layer of ``rank_pattern`` gets its rank from there as alpha, unless ``alpha_pattern`` has the same key.
    """
    if lora.get("alpha", 1) is not None:
        return lora
    rank, ranks, alphas = (none_to_empty(lora.get(name)) for name in ("rank", "rank_pattern", "alpha_pattern"))
    if isinstance(ranks, dict) and isinstance(alphas, dict):
        lora = lora | {"alpha_pattern": {key: value for key, value in ranks.items() if is_rank(value)} | alphas}
    return lora | {"alpha": rank if is_rank(rank) else 1}


def is_rank(value: Any) -> bool:
    """Return whether a value is a valid rank. An invalid rank is reported once, and not again as an alpha."""
    return type(value) is int and value > 0
