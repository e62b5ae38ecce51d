"""Inputs of the stage: the trained adapter, its base model, and the settings with default name and prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import Adapter
from lora_dag.bases import resolve
from lora_dag.bases.component_files import digests, require_same_base, weight_files
from lora_dag.core.console import UserError, log
from lora_dag.core.params import Config, Dtype, ModelParams
from lora_dag.core.tensors import read_header
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from stages.export.params import ExportParams, format_problems, rank_problems, step_problems

if TYPE_CHECKING:
    import torch

    from lora_dag.bases.resolve import Base
    from lora_dag.families.protocol import Family

HALF: dict[str, Dtype] = {"F16": "float16", "BF16": "bfloat16"}
"""Dtype in a safetensors header -> its name, for half precisions."""


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

    @property
    def half_precision(self) -> Dtype | None:
        """Half precision of all weights in the denoiser's files; None if there is another dtype."""
        dtypes = {entry["dtype"] for entry in self.entries(self.family.DENOISER)}
        return HALF.get(dtypes.pop()) if len(dtypes) == 1 else None

    def entries(self, component: str) -> list[dict[str, Any]]:
        """Return dtype and shape of every tensor in a component's files."""
        files = weight_files(Path(self.base.model.pretrained) / component, self.base.model.variant)
        return [entry for path in files for entry in read_header(path).values()]

    @property
    def gigabytes(self) -> float:
        """Memory of the adapted components while adapters are checked, by the headers of their files (10^9 bytes)."""
        sizes = {
            name: sum(math.prod(entry["shape"]) for entry in self.entries(name))
            for name in (self.family.DENOISER, *self.adapter.text_lora)
        }
        is_half = self.half_precision and not self.params.pipeline_formats
        return (4 * sum(sizes.values()) - (2 * sizes[self.family.DENOISER] if is_half else 0)) / 1e9


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
