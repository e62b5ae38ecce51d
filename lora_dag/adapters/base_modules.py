"""The base's modules that an adapter is put on: the denoiser, and CLIP's text encoders where they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.adapters.adapted import Adapted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family


@dataclass(frozen=True)
class BaseModules:
    """Frozen modules, as the family loads them."""

    denoiser: Any
    text: Any
    """The family's object of tokenizers and CLIP encoders; None where no encoder is adapted."""
    adapted: dict[str, Any]
    """Component -> module: the denoiser first, then each adapted text encoder."""

    def inject(self, adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
        """Put an adapter's layers on the modules, with these tensors of its file."""
        encoders = {name: self.adapted[name] for name in adapter.text_lora}
        Adapted(self.denoiser, adapter.lora_config, adapter.text_lora, encoders).load_state_dict(weights)


def load(model: ModelParams, family: Family, encoders: Collection[str], device: torch.device) -> BaseModules:
    """Read the modules from the base's files.

    Args:
        encoders: components of the text encoders that the adapter has layers in.
    """
    denoiser = family.load_denoiser(model, device)
    text = family.load_trainable_text(model, device) if encoders else None
    found = family.text_encoders(text) if encoders else {}
    return BaseModules(denoiser, text, {family.DENOISER: denoiser} | {name: found[name] for name in encoders})
