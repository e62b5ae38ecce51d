"""Section ``export``: which files are written, and what a format cannot carry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.core.params import Params

Format = Literal["diffusers", "peft", "comfyui", "merged"]
REPO_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"


class PushParams(Params):
    """Where ``python -m stages.export --push`` uploads to; no stage does."""

    repo_id: str = Field(pattern=REPO_ID, max_length=96)
    """Model repository of the Hugging Face Hub, user/name."""
    private: bool
    """Who may see it, when it is made; one that stands the other way is refused."""


class ExportParams(Params):
    """Section ``export``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Title in the headers, and the file name below comfyui/."""
    formats: Annotated[list[Format], Field(min_length=1)]
    """What is written; merged is the whole pipeline in float32."""
    prompt: str
    """Prompt of the model card's example and of the comparison."""
    base_model: str | None = Field(pattern=REPO_ID, max_length=96)
    """Where the base stands on the Hub, for headers and card; null if it is not there."""
    license: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$", max_length=100)
    """SPDX or Hub id of the adapter's licence, for headers and card; null says that none is stated."""
    seed: int = Field(ge=0)
    """Of the comparison's noise."""
    push_to_hub: PushParams | None
    """Decides nothing that is written: dvc.yaml lists the other keys of this section one by one."""

    @field_validator("formats")
    @classmethod
    def no_format_twice(cls, formats: list[Format]) -> list[Format]:
        if len(set(formats)) < len(formats):
            raise ValueError(f"got {formats}, a format twice")
        return formats


def refusals(formats: list[Format], bias: str, use_dora: bool, denoiser: str) -> list[str]:
    """A line per format that would lose or change something, with what to use instead.

    Args:
        bias: ``lora.bias`` where biases are trained, else none.
        denoiser: ``unet`` or ``transformer``.
    """
    found = []
    for name in formats:
        what = ""
        if name in ("diffusers", "peft") and bias == "all":
            what = "biases of layers that carry no adapter have no place in it (lora.bias all)"
        elif name in ("diffusers", "peft") and bias == "lora_only" and use_dora:
            what = "PEFT has no bias beside DoRA (lora.bias lora_only with lora.use_dora)"
        elif name == "comfyui" and denoiser != "unet" and bias != "none":
            what = "ComfyUI joins a transformer's q, k and v into one layer, whose bias no key names"
        if what:
            instead = "merged" if name == "comfyui" or denoiser != "unet" else "comfyui or merged"
            found.append(f"params.yaml export.formats: {name} cannot hold this adapter: {what}; use {instead}")
    return found
