"""Inputs of the stage: the trained adapter, its base model, and the settings with default name and prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dag.artifacts.adapter import Adapter
from lora_dag.bases import resolve
from lora_dag.bases.component_files import digests, require_same_base
from lora_dag.core.console import UserError, log
from lora_dag.core.params import Config, ModelParams
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from stages.export.params import ExportParams, format_problems, rank_problems, step_problems

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lora_dag.bases.resolve import Base
    from lora_dag.families.protocol import Family


@dataclass(frozen=True)
class Source:
    """An adapter at one training step, with its base model."""

    params: ExportParams
    """Settings with a name and a prompt. ``step`` is null for the last step."""
    base: Base
    family: Family
    adapter: Adapter
    weights: dict[str, torch.Tensor]
    """Tensors of the adapter's file."""

    @property
    def megabytes(self) -> float:
        """Size of the adapter's tensors in MB."""
        return sum(tensor.nbytes for tensor in self.weights.values()) / 1e6


def read_source(config: Config, folder: Path) -> Source:
    """Read the adapter in ``folder``.

    Raises:
        UserError: the base is not the adapter's, or a format, rank or step is impossible for this adapter.
    """
    model, params = config.section(ModelParams), config.section(ExportParams)
    family = load_family(model.family)
    base, adapter = resolve.resolve(model, family), Adapter.load(folder)
    require_same_base(adapter.base, digests(base.model, family.COMPONENTS), folder)
    require_possible(params, adapter, family.DENOISER)
    params = params.with_words(dataset_source(config), str(adapter.made_from.get("caption", "")))
    if params.step == adapter.num_steps:
        params = params.model_copy(update={"step": None})
    if params.step:
        log.info("snapshot    of step %d of %d", params.step, adapter.num_steps)
    return Source(params, base, family, adapter, adapter.weights(folder, params.step))


def require_possible(params: ExportParams, adapter: Adapter, denoiser: str) -> None:
    """Check formats, ranks and step.

    Raises:
        UserError: one problem for each that is impossible for this adapter.
    """
    lora = adapter.lora_config
    kind = AdapterKind(
        algo=lora.get("algo", "lora"),
        bias=lora.get("bias", "none") if adapter.biases else "none",
        use_dora=lora.get("use_dora", False),
        rank=max([lora["r"], *lora.get("rank_pattern", {}).values()]),
        denoiser=denoiser,
        trains_text=bool(adapter.text_lora),
    )
    problems = format_problems(params.formats, kind, params.setting("formats"))
    problems += rank_problems(params.resized_ranks, kind, params.setting("resized_ranks"))
    problems += step_problems(params.step, adapter.snapshots, adapter.num_steps, params.setting("step"))
    if problems:
        raise UserError(*problems)


def dataset_source(config: Config) -> str:
    """Return ``dataset.source`` without importing the section's class, which is not code of this stage."""
    return str(config.sections["dataset"].model_dump()["source"])
