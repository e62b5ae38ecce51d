"""Section ``export``: which files are written, and what a format cannot carry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.core.params import Params

Format = Literal["diffusers", "peft", "comfyui", "merged"]


class ExportParams(Params):
    """Section ``export``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Title in the headers, and the file name below comfyui/."""
    formats: Annotated[list[Format], Field(min_length=1)]
    """What is written; merged is the whole pipeline in float32."""
    prompt: str
    """Prompt of the model card's example and of the comparison."""
    num_inference_steps: int = Field(ge=1, le=1000)
    """Sampling steps of the comparison."""
    guidance_scale: float = Field(ge=1)
    seed: int = Field(ge=0)

    @field_validator("formats")
    @classmethod
    def no_format_twice(cls, formats: list[Format]) -> list[Format]:
        if len(set(formats)) < len(formats):
            raise ValueError(f"got {formats}, a format twice")
        return formats


def refusals(formats: list[Format], bias: str, use_dora: bool, denoiser: str, text: bool = False) -> list[str]:
    """A line per format that would lose or change something, with what to use instead.

    Args:
        bias: ``lora.bias`` where biases are trained, else none.
        denoiser: ``unet`` or ``transformer``.
        text: whether text encoders are trained.
    """
    found = []
    for name in formats:
        what, instead = "", "comfyui or merged" if denoiser == "unet" else "merged"
        if name in ("diffusers", "peft") and bias == "all":
            what = "biases of layers that carry no adapter have no place in it (lora.bias all)"
        elif name in ("diffusers", "peft") and bias == "lora_only" and use_dora:
            what = "PEFT has no bias beside DoRA (lora.bias lora_only with lora.use_dora)"
        elif name == "diffusers" and text and use_dora:
            what = "it loses text encoders' magnitudes while loading (lora.train_text_encoder with lora.use_dora)"
            instead = "peft, comfyui or merged"
        elif name == "comfyui" and denoiser != "unet" and bias != "none":
            what = "ComfyUI joins a transformer's q, k and v into one layer, whose bias no key names"
        if what:
            found.append(f"params.yaml export.formats: {name} cannot hold this adapter: {what}; use {instead}")
    return found
