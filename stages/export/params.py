"""Section ``export``: which files are written, and what a format cannot carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lora_dag.core.params import Params
from lora_dag.formats import FORMATS, AdapterKind, load_format
from lora_dag.pages import words

if TYPE_CHECKING:
    Format = str
else:  # the files of lora_dag/formats
    Format = Literal[FORMATS]
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
            others = any_of([name for name in FORMATS if not is_pipeline(name)])
            raise ValueError(f"resized_ranks: no copy of {self.formats[0]} is made; add {others} to formats")
        return self

    def with_words(self, source: str, caption: str) -> ExportParams:
        """With a name and a prompt; ``caption`` is one of the dataset's."""
        own = self.model_dump()
        found = {"name": words.name_of(own, source, caption), "prompt": words.prompt_of(own, source, caption)}
        return self.model_copy(update=found)

    @property
    def resizable(self) -> list[Format]:
        """The formats that the copies of resized_ranks are written in."""
        return [name for name in self.formats if not is_pipeline(name)]


def format_refusals(formats: list[Format], adapter: AdapterKind) -> list[str]:
    """A line per format that would lose or change something of the adapter, with the formats that hold it."""
    instead = sorted((name for name in FORMATS if not load_format(name).refuse(adapter)), key=is_pipeline)
    return [
        f"params.yaml export.formats: {name} cannot hold this adapter: {reason}; use {any_of(instead)}"
        for name in formats
        if (reason := load_format(name).refuse(adapter))
    ]


def is_pipeline(name: Format) -> bool:
    """Whether a format holds a whole pipeline."""
    return not load_format(name).IS_ADAPTER


def any_of(names: list[str]) -> str:
    """``a, b or c``"""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def step_refusals(step: int | None, snapshots: list[int], num_steps: int) -> list[str]:
    """A line for a step of which nothing is kept."""
    if step in (None, num_steps, *snapshots):
        return []
    shown = snapshots if len(snapshots) <= MAX_SHOWN else [*snapshots[:2], "...", *snapshots[-2:]]
    there = f"those of {', '.join(map(str, shown))}" if snapshots else "none"
    known = f"snapshots there are {there} (train.snapshot_every_n_steps)"
    return [f"params.yaml export.step: {step} has no snapshot; {known}; use one, or null for the end at {num_steps}"]


def rank_refusals(resized_ranks: list[int], adapter: AdapterKind) -> list[str]:
    """A line per rank that is not below the adapter's largest: its copy would be no smaller; LoRA alone has copies."""
    where = "params.yaml export.resized_ranks"
    if resized_ranks and adapter.algo != "lora":
        return [f"{where}: of lora.algo {adapter.algo} there are no smaller copies; use []"]
    if resized_ranks and adapter.trains_text:
        return [f"{where}: with lora.train_text_encoder there are no smaller copies; use []"]
    return [
        f"{where}: {rank} is not below the adapter's rank {adapter.rank}; use a smaller one"
        for rank in resized_ranks
        if rank >= adapter.rank
    ]
