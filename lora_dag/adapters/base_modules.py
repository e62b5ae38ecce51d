"""Modules of the base model that an adapter changes: the denoiser and, if trained, CLIP's text encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import compact
from lora_dag.adapters.adapter_set import AdapterSet

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.core.params import Dtype, ModelParams
    from lora_dag.families.protocol import Family


@dataclass(frozen=True)
class BaseModules:
    """Frozen modules, loaded by the family."""

    denoiser: Any
    text: Any
    """Tokenizers and CLIP encoders, as the family's object; None if no encoder is adapted."""
    adapted: dict[str, Any]
    """Component -> module, the denoiser first, then each adapted text encoder."""

    def inject(self, adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter's layers to the modules and load its tensors."""
        encoders = {name: self.adapted[name] for name in adapter.text_lora}
        AdapterSet(self.denoiser, adapter.lora_config, adapter.text_lora, encoders).load_state_dict(weights)


def load(
    model: ModelParams,
    family: Family,
    encoders: Collection[str],
    device: torch.device,
    compact_dtype: Dtype | None = None,
) -> BaseModules:
    """Load the modules from the base model's files.

    Args:
        encoders: components of the adapted text encoders.
        compact_dtype: half precision of the denoiser's files, in which a float32 one is kept (``compact.py``).
    """
    denoiser = compact.load(model, family.DENOISER, device, compact_dtype) if compact_dtype else None
    denoiser = denoiser or family.load_denoiser(model, device)
    text = family.load_trainable_text(model, device) if encoders else None
    modules = family.text_encoders(text) if encoders else {}
    return BaseModules(denoiser, text, {family.DENOISER: denoiser} | {name: modules[name] for name in encoders})
