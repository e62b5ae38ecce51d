"""Section ``validate``: the frozen table, and the pictures that are drawn."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from lora_dag.core.params import HomePath, Params

if TYPE_CHECKING:
    from lora_dag.families.protocol import Family


class FeatureModelParams(Params):
    """An image-text model, pinned by its content."""

    path: HomePath = Field(exclude=True)
    """A folder in the transformers layout, or a YAML file that pins a model of the Hub: ``validate/feature_files.py``.
    Where it lies is no part of what is measured.
    """
    sha256: str | None = None
    """Digest of the folder, or of the YAML file; without it the stage stops and prints it."""


class ValidateParams(Params):
    """Section ``validate``."""

    num_timesteps: int = Field(ge=1, le=1000)
    """Strata of the training timesteps, one row of the table in each, per picture."""
    max_pictures: int = Field(ge=1)
    """Held-out pictures in the table, and as many training pictures beside them."""
    batch_size: int = Field(ge=1, le=1024)
    """Rows, or pictures being drawn, at a time."""
    prompts: list[str] = Field(min_length=1)
    """Rows of the sheets."""
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0)
    """Classifier-free guidance, as the pipeline counts it: none at 1 or below, or at 0 (z_image)."""
    negative_prompt: str
    num_seeds: int = Field(ge=1, le=64)
    """Pictures per prompt by base and final adapter, for diversity and nearest training pictures; sheets show one."""
    drift_prompts: list[str]
    """Prompts of the base's own domain: what it draws for them is asked of base and adapter. Empty for none."""
    max_copied_share: float | None = Field(ge=0, le=1)
    """Largest ``samples.copied_share`` that the stage lets pass; null for any."""
    scales: list[float] = Field(min_length=1)
    """Adapter strengths, columns of the sample sheet; the progress sheet and the measures are at 1."""
    ink_measures: bool
    """Measure chroma and dark share of the samples."""
    feature_model: FeatureModelParams | None
    """Measures how the samples fit their prompts, and how far they are from the held-out pictures."""
    seed: int = Field(ge=0)
    """Of the table's timesteps and noise, of the bootstrap and of the samples."""

    @model_validator(mode="after")
    def check(self) -> Self:
        listed: dict[str, list[str] | list[float]] = {
            "prompts": self.prompts,
            "drift_prompts": self.drift_prompts,
            "scales": self.scales,
        }
        for name, values in listed.items():
            same = Counter(" ".join(value.split()) if isinstance(value, str) else value for value in values)
            twice = [value for value, count in same.items() if count > 1]
            if twice:
                raise ValueError(f"{name} lists {twice[0]!r} twice; name it once")
        for name, prompts in (("prompts", self.prompts), ("drift_prompts", self.drift_prompts)):
            if not all(prompt.strip() for prompt in prompts):
                raise ValueError(f"{name} has an empty prompt; describe a picture or remove it")
        return self


def prompt_problems(settings: ValidateParams, family: Family) -> list[str]:
    """A line for a negative prompt that the family's pipeline would not read."""
    if not settings.negative_prompt:
        return []
    if family.NO_GUIDANCE is None:
        found = f"{family.PIPELINE} takes guidance_scale as an input of the model and reads no negative prompt"
        return [f"params.yaml validate.negative_prompt: {found}; empty it"]
    if settings.guidance_scale <= family.NO_GUIDANCE:
        found = f"negative_prompt is ignored at guidance_scale {settings.guidance_scale}"
        return [f"params.yaml validate: {found}; raise that above {family.NO_GUIDANCE:g} or empty this"]
    return []
