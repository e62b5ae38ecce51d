"""Section ``export``: which files are written, and what a format cannot carry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lora_dag.core.params import Params
from lora_dag.pages import words

Format = Literal["diffusers", "peft", "comfyui", "merged"]
MAX_SHOWN = 12
"""Snapshots' steps that a refusal lists one by one."""
REPO_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"


class PushParams(Params):
    """Where ``lora-dag push`` uploads to; no stage does."""

    repo_id: str = Field(pattern=REPO_ID, max_length=96)
    """Model repository of the Hugging Face Hub, user/name."""
    private: bool
    """Who may see it, when it is made; one that stands the other way is refused."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Words(Params):
    """What a dataset's card says where ``export.name``, ``export.prompt`` and ``report.title`` are null."""

    name: Name | None = None
    prompt: str | None = None
    title: str | None = None


class ExportParams(Params):
    """Section ``export``."""

    name: Name | None
    """Title in the headers, and the file name below comfyui/; null for that of the dataset."""
    formats: Annotated[list[Format], Field(min_length=1)]
    """What is written; merged is the whole pipeline in float32."""
    resized_ranks: list[Annotated[int, Field(ge=1)]]
    """Smaller ranks at which copies are written as well, in each of the formats but merged."""
    step: int | None = Field(ge=1)
    """Of the snapshot that is exported, such as ``val.best_step``; null for the adapter at the end."""
    prompt: str | None
    """Prompt of the model card's example and of the comparison; null for one of the dataset."""
    datasets: dict[str, Words] | None
    """``dataset.source`` -> its words for what is null; a dataset that is not here has those of its own captions."""
    base_model: str | None = Field(pattern=REPO_ID, max_length=96)
    """Where the base stands on the Hub, for headers and card; null if it is not there."""
    license: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$", max_length=100)
    """SPDX or Hub id of the adapter's licence, for headers and card; null says that none is stated."""
    seed: int = Field(ge=0)
    """Of the comparison's noise."""
    push_to_hub: PushParams | None
    """Decides nothing that is written: dvc.yaml lists the other keys of this section one by one."""

    @field_validator("formats", "resized_ranks")
    @classmethod
    def none_twice(cls, values: list[Format] | list[int]) -> list[Format] | list[int]:
        if len(set(values)) < len(values):
            raise ValueError(f"got {values}, one of them twice")
        return values

    @model_validator(mode="after")
    def copies_have_a_format(self) -> ExportParams:
        if self.resized_ranks and not self.resizable:
            raise ValueError("resized_ranks: no copy of merged is made; add diffusers, peft or comfyui to formats")
        return self

    def with_words(self, source: str, caption: str) -> ExportParams:
        """With a name and a prompt; ``caption`` is one of the dataset's."""
        own = self.model_dump()
        found = {"name": words.name_of(own, source, caption), "prompt": words.prompt_of(own, source, caption)}
        return self.model_copy(update=found)

    @property
    def resizable(self) -> list[Format]:
        """The formats that the copies of resized_ranks are written in."""
        return [name for name in self.formats if name != "merged"]


def refusals(
    formats: list[Format], algo: str, bias: str, use_dora: bool, denoiser: str, text: bool = False
) -> list[str]:
    """A line per format that would lose or change something, with what to use instead.

    Args:
        algo: ``lora.algo``.
        bias: ``lora.bias`` where biases are trained, else none.
        denoiser: ``unet`` or ``transformer``.
        text: whether text encoders are trained.
    """
    found = []
    for name in formats:
        what = ""
        others = ["comfyui"] if bias == "none" or denoiser == "unet" else []
        if name == "diffusers" and algo != "lora":
            what = f"the pipeline's load_lora_weights reads LoRA alone (lora.algo {algo})"
            others += ["peft"] if bias == "none" else []
        elif name in ("diffusers", "peft") and bias == "all":
            what = "biases of layers that carry no adapter have no place in it (lora.bias all)"
        elif name in ("diffusers", "peft") and bias == "lora_only" and use_dora:
            what = "PEFT has no bias beside DoRA (lora.bias lora_only with lora.use_dora)"
        elif name == "peft" and bias == "lora_only" and algo != "lora":
            what = f"PEFT has no bias beside it (lora.bias lora_only with lora.algo {algo})"
        elif name == "diffusers" and text and use_dora:
            what = "it loses text encoders' magnitudes while loading (lora.train_text_encoder with lora.use_dora)"
            others = ["peft", *others]
        elif name == "comfyui" and denoiser != "unet" and bias != "none":
            what = "ComfyUI joins a transformer's q, k and v into one layer, whose bias no key names"
        if what:
            instead = f"{', '.join(others)} or merged" if others else "merged"
            found.append(f"params.yaml export.formats: {name} cannot hold this adapter: {what}; use {instead}")
    return found


def step_refusals(step: int | None, snapshots: list[int], num_steps: int) -> list[str]:
    """A line for a step of which nothing is kept."""
    if step in (None, num_steps, *snapshots):
        return []
    shown = snapshots if len(snapshots) <= MAX_SHOWN else [*snapshots[:2], "...", *snapshots[-2:]]
    there = f"those of {', '.join(map(str, shown))}" if snapshots else "none"
    known = f"snapshots there are {there} (train.snapshot_every_n_steps)"
    return [f"params.yaml export.step: {step} has no snapshot; {known}; use one, or null for the end at {num_steps}"]


def rank_refusals(
    resized_ranks: list[int], algo: str, rank: int, rank_pattern: dict[str, int], text: bool = False
) -> list[str]:
    """A line per rank that is not below the adapter's largest: its copy would be no smaller; LoRA alone has copies."""
    largest = max([rank, *rank_pattern.values()])
    where = "params.yaml export.resized_ranks"
    if resized_ranks and algo != "lora":
        return [f"{where}: of lora.algo {algo} there are no smaller copies; use []"]
    if resized_ranks and text:
        return [f"{where}: with lora.train_text_encoder there are no smaller copies; use []"]
    return [
        f"{where}: {r} is not below the adapter's rank {largest}; use a smaller one"
        for r in resized_ranks
        if r >= largest
    ]
