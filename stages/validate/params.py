"""Section ``validate``: the evaluation set, and the samples."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from lora_dag.core.console import Problem
from lora_dag.core.params import HomePath, Params
from lora_dag.core.setting_problem import setting_problem

if TYPE_CHECKING:
    from lora_dag.families.protocol import Family


class FeatureModelParams(Params):
    """An image-text model, pinned by its content."""

    path: HomePath = Field(exclude=True)
    """Folder in the transformers layout, or YAML file that pins a model of the Hub (``validate/feature_files.py``).
    The path does not count as an input of the run; the content does."""
    sha256: str | None = None
    """Digest of the folder or of the YAML file. Without it the stage stops and prints the digest."""


class ValidateParams(Params):
    """Section ``validate``."""

    num_timesteps: int = Field(ge=1, le=1000)
    """Timesteps at which the loss of each image is measured, one in each of so many equal parts of the schedule."""
    max_images: int = Field(ge=1)
    """Largest number of held-out images in the evaluation set. As many training images are measured for comparison."""
    batch_size: int = Field(ge=1, le=1024)
    """Rows of the evaluation set, or samples, per forward pass."""
    prompts: list[str] = Field(min_length=1)
    """Prompts of the samples, one row of the sheets each."""
    num_inference_steps: int = Field(ge=1, le=1000)
    """Sampler steps per image."""
    guidance_scale: float = Field(ge=0)
    """Classifier-free guidance as the pipeline defines it. No guidance: 1 or less (z_image: 0)."""
    negative_prompt: str
    """Text that guidance moves away from. Must be empty without guidance, and for flux."""
    num_seeds: int = Field(ge=1, le=64)
    """Images per prompt by base and final adapter, for diversity and nearest training images. Sheets show the first."""
    drift_prompts: list[str]
    """Prompts of the base's own style. The loss on images that the base draws for them measures what the adapter
    made it forget. Empty: no measurement."""
    max_copied_share: float | None = Field(ge=0, le=1)
    """Largest ``samples.copied_share`` with which the stage passes. null: no limit."""
    scales: list[float] = Field(min_length=1)
    """Adapter strengths, one column of the sample sheet each. The progress sheet and all measurements use 1."""
    ink_measures: bool
    """Whether chroma and dark share of the samples are measured."""
    unquantized_loss: bool
    """With ``model.quantization``: whether the held-out loss is also measured on the base as it is, which then must fit
    into memory. The difference is the price of the quantization."""
    feature_model: FeatureModelParams | None
    """Image-text model that measures how well samples match their prompts, and their distance to the held-out
    images."""
    seed: int = Field(ge=0)
    """Seed of timesteps, noise, bootstrap and samples."""

    ADDED = {"unquantized_loss": True}

    @field_validator("prompts", "drift_prompts", "scales")
    @classmethod
    def lists_each_value_once(cls, values: list[str] | list[float]) -> list[str] | list[float]:
        same = Counter(" ".join(value.split()) if isinstance(value, str) else value for value in values)
        if twice := [value for value, count in same.items() if count > 1]:
            raise setting_problem("value-twice", f"{twice[0]!r} is listed twice. List it once.")
        return values

    @field_validator("prompts", "drift_prompts")
    @classmethod
    def lists_no_empty_prompt(cls, prompts: list[str]) -> list[str]:
        if not all(prompt.strip() for prompt in prompts):
            raise setting_problem("empty-prompt", "a prompt is empty. Describe an image or remove it.")
        return prompts


def prompt_problems(settings: ValidateParams, family: Family) -> list[Problem]:
    """Return a problem for a negative prompt that the family's pipeline ignores."""
    if not settings.negative_prompt:
        return []
    if family.NO_GUIDANCE is None:
        reason = f"{family.PIPELINE} passes guidance_scale to the model and ignores a negative prompt"
        return [Problem("setting-ignored", f"{settings.setting('negative_prompt')}: {reason}. Set it to ''.")]
    if settings.guidance_scale <= family.NO_GUIDANCE:
        reason = f"it is ignored at guidance_scale {settings.guidance_scale}"
        remedy = f"Set guidance_scale above {family.NO_GUIDANCE:g}, or negative_prompt to ''"
        return [Problem("setting-ignored", f"{settings.setting('negative_prompt')}: {reason}. {remedy}.")]
    return []
