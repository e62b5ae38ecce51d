"""What an export starts from: the adapter that was trained, its base, and the settings with their words filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dag.artifacts.adapter import Adapter
from lora_dag.bases import resolve
from lora_dag.bases.layout import digests, require_same_base
from lora_dag.core.console import UserError, log
from lora_dag.core.params import Config, ModelParams
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from stages.export.params import ExportParams, format_refusals, rank_refusals, step_refusals

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lora_dag.bases.resolve import Base
    from lora_dag.families.protocol import Family


@dataclass(frozen=True)
class Source:
    """An adapter at one step, on its base."""

    params: ExportParams
    """With a name and a prompt; ``step`` is null for the end of the training."""
    base: Base
    family: Family
    adapter: Adapter
    weights: dict[str, torch.Tensor]
    """Tensors of the adapter's file."""

    @property
    def megabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.weights.values()) / 1e6


def read_source(config: Config, folder: Path) -> Source:
    """Read the adapter in ``folder``.

    Raises:
        UserError: another base than the adapter's; a format, rank or step that this adapter does not have.
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
    """Raises UserError with a line for each format, rank or step that this adapter does not have."""
    lora = adapter.lora_config
    kind = AdapterKind(
        algo=lora.get("algo", "lora"),
        bias=lora.get("bias", "none") if adapter.biases else "none",
        use_dora=lora.get("use_dora", False),
        rank=max([lora["r"], *lora.get("rank_pattern", {}).values()]),
        denoiser=denoiser,
        trains_text=bool(adapter.text_lora),
    )
    found = format_refusals(params.formats, kind) + rank_refusals(params.resized_ranks, kind)
    found += step_refusals(params.step, adapter.snapshots, adapter.num_steps)
    if found:
        raise UserError(*found)


def dataset_source(config: Config) -> str:
    """Of section dataset, whose class is no code of this stage."""
    return str(config.sections["dataset"].model_dump()["source"])
