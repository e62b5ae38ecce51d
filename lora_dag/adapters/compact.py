"""Frozen float32 modules that take half the memory: weights stay in the half precision of their files.

A large weight is converted at each use, so a forward pass has the bits of a module that was loaded in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

from lora_dag.families import common

if TYPE_CHECKING:
    from lora_dag.core.params import Dtype, ModelParams

SMALL = 2**16
"""Values of the largest parameter that is converted once."""


class ToFloat32(torch.nn.Module):
    """Parametrization that converts a weight at each use."""

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the weight in float32."""
        return stored.float()


def load(model: ModelParams, component: str, device: torch.device, dtype: Dtype) -> Any:
    """Load a component that computes in float32; None if a part of it would be rounded.

    Args:
        dtype: half precision of all weights in the component's files.
    """
    module = common.load_frozen(model.model_copy(update={"dtype": dtype}), component, device)
    if any(owner._non_persistent_buffers_set for owner in module.modules()):  # not in the files, and rounded here
        return None
    convert(module)
    return module


def convert(module: torch.nn.Module) -> None:
    """Convert small parameters and buffers to float32, and large weights of layers at each use."""
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            is_layer = isinstance(owner, torch.nn.Linear | torch.nn.Conv2d) and name == "weight"
            if is_layer and parameter.numel() > SMALL:
                parametrize.register_parametrization(owner, name, ToFloat32(), unsafe=True)
                owner.register_state_dict_post_hook(restore_name)
            else:
                parameter.data = parameter.data.float()
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(owner, name, buffer.float())


def restore_name(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a converted weight its own name in a state dict, where diffusers' loaders look for its shape."""
    state[f"{prefix}weight"] = state.pop(f"{prefix}parametrizations.weight.original")
