"""Section ``export``: the files to write, and the adapters that a format or a smaller rank cannot hold."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lora_dag.core.console import Problem
from lora_dag.core.params import Params
from lora_dag.core.setting_problem import setting_problem
from lora_dag.formats import FORMATS, AdapterKind, load_format
from lora_dag.pages import default_texts

if TYPE_CHECKING:
    Format = str
else:  # the files of lora_dag/formats
    Format = Literal[FORMATS]
MAX_SHOWN = 12
"""Largest number of snapshots that a message lists one by one."""
REPO_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"


class PushParams(Params):
    """Target of ``lora-dag push``. No stage uploads anything."""

    repo_id: str = Field(pattern=REPO_ID, max_length=96, examples=["user/name"])
    """Model repository on the Hugging Face Hub: user/name."""
    private: bool
    """Visibility of a new repository. An existing repository with another visibility is rejected."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class DatasetWords(Params):
    """Name, prompt and title of a dataset, used if ``export.name``, ``export.prompt`` and ``report.title`` are null."""

    name: Name | None = Field(default=None, examples=["ink-icons"])
    """Used where ``export.name`` is null."""
    prompt: str | None = None
    """Used where ``export.prompt`` is null."""
    title: str | None = None
    """Used where ``report.title`` is null."""


class ExportParams(Params):
    """Section ``export``."""

    name: Name | None = Field(examples=["ink-icons"])
    """Title in the file headers and file name in comfyui/. null: name of the dataset."""
    formats: Annotated[list[Format], Field(min_length=1)]
    """Formats to write. merged is the whole pipeline in float32."""
    resized_ranks: list[Annotated[int, Field(ge=1)]]
    """Smaller ranks. A copy of the adapter is written at each rank in every format except merged."""
    step: int | None = Field(ge=1)
    """Training step of the snapshot to export, such as ``val.best_step``. null: the last step."""
    prompt: str | None
    """Prompt of the model card's example and of the load-back check. null: a prompt of the dataset."""
    datasets: dict[str, DatasetWords] | None
    """``dataset.source`` -> name, prompt and title, used where these settings are null. A dataset that is not
    listed uses its folder's name and one of its captions."""
    base_model: str | None = Field(pattern=REPO_ID, max_length=96, examples=["owner/name"])
    """Hub id of the base, for file headers and model card. null: not stated."""
    license: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$", max_length=100, examples=["apache-2.0"])
    """SPDX or Hub id of the adapter's license, for file headers and model card. null: not stated."""
    seed: int = Field(ge=0)
    """Seed of the noise in the load-back check."""
    push_to_hub: PushParams | None
    """Target of `lora-dag push`. It changes no written file and reruns no stage."""

    @field_validator("formats", "resized_ranks")
    @classmethod
    def lists_each_value_once(cls, values: list[Format] | list[int]) -> list[Format] | list[int]:
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise setting_problem("value-twice", f"{twice[0]!r} is listed twice. List it once.")
        return values

    @model_validator(mode="after")
    def resized_ranks_have_a_format(self) -> ExportParams:
        if self.resized_ranks and not self.adapter_formats:
            others = any_of([name for name in FORMATS if not is_pipeline(name)])
            text = f"{self.formats[0]} cannot hold a copy of smaller rank. Add {others} to export.formats."
            raise setting_problem("no-format-for-rank", text, "resized_ranks")
        return self

    def with_words(self, source: str, caption: str) -> ExportParams:
        """Return the settings with default name and prompt; ``caption`` is a caption of the dataset."""
        own = self.model_dump()
        texts = {
            "name": default_texts.adapter_name(own, source, caption),
            "prompt": default_texts.example_prompt(own, source, caption),
        }
        return self.model_copy(update=texts)

    @property
    def adapter_formats(self) -> list[Format]:
        """Formats that hold only the adapter; the copies of ``resized_ranks`` have them too."""
        return [name for name in self.formats if not is_pipeline(name)]

    @property
    def pipeline_formats(self) -> list[Format]:
        """Formats that hold a whole pipeline."""
        return [name for name in self.formats if is_pipeline(name)]


def format_problems(
    formats: list[Format], adapter: AdapterKind, setting: str = "params.yaml export.formats"
) -> list[Problem]:
    """Return a problem per format that cannot hold the adapter, with the formats that can.

    Args:
        setting: place of the setting for messages.
    """
    instead = sorted((name for name in FORMATS if not load_format(name).unsupported_reason(adapter)), key=is_pipeline)
    return [
        Problem("format-unsupported", f"{setting}: {name} cannot hold this adapter: {reason}. Use {any_of(instead)}.")
        for name in formats
        if (reason := load_format(name).unsupported_reason(adapter))
    ]


def is_pipeline(name: Format) -> bool:
    """Return whether a format holds a whole pipeline."""
    return not load_format(name).IS_ADAPTER


def any_of(names: list[str]) -> str:
    """Return ``a, b or c``."""
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def step_problems(
    step: int | None, snapshots: list[int], num_steps: int, setting: str = "params.yaml export.step"
) -> list[Problem]:
    """Return a problem for a step without a snapshot.

    Args:
        num_steps: last training step.
        setting: place of the setting for messages.
    """
    if step in (None, num_steps, *snapshots):
        return []
    shown = snapshots if len(snapshots) <= MAX_SHOWN else [*snapshots[:2], "...", *snapshots[-2:]]
    listed = f"Snapshots: {', '.join(map(str, shown))}" if snapshots else "There are none"
    remedy = f"Use one of them, or null for the last step, {num_steps}." if snapshots else f"Use null for {num_steps}."
    return [
        Problem(
            "no-snapshot", f"{setting}: step {step} has no snapshot. {listed} (train.snapshot_every_n_steps). {remedy}"
        )
    ]


def rank_problems(
    resized_ranks: list[int], adapter: AdapterKind, setting: str = "params.yaml export.resized_ranks"
) -> list[Problem]:
    """Return a problem per rank that is not below the adapter's largest rank, or if the adapter cannot be resized.

    Args:
        setting: place of the setting for messages.
    """
    if resized_ranks and (adapter.algo != "lora" or adapter.trains_text):
        cause = "lora.train_text_encoder" if adapter.algo == "lora" else f"lora.algo {adapter.algo}"
        return [Problem("rank-unsupported", f"{setting}: an adapter with {cause} cannot be resized. Use [].")]
    return [
        Problem(
            "rank-too-high", f"{setting}: {rank} is not below the adapter's rank {adapter.rank}. Use a smaller rank."
        )
        for rank in resized_ranks
        if rank >= adapter.rank
    ]
