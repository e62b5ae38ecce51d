"""Bytes of tensors that are alive, counted while code runs: on real tensors, or on fake ones that have no storage.

With fake tensors (torch.fx's FakeTensorMode) a training step of a 12 B model runs in seconds without its weights.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Iterable

FLOPS = flop_registry | {
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{suffix}")
    ]
    for suffix in ("", "_backward")
}
"""Operation -> its count in torch.utils.flop_counter, which does not list the CPU's attention."""
INDEX = torch.ops.aten.index.Tensor


class Allocations(TorchDispatchMode):
    """Counts the storages of all tensors that operations return inside ``with``.

    Memory that a kernel uses inside, and what an allocator keeps free, are not counted.

    Args:
        num_kept: values that each row of a boolean mask of fake tensors keeps; without it, all.
    """

    def __init__(self, num_kept: int | None = None) -> None:
        super().__init__()
        self.num_kept = num_kept
        self.live = 0
        """Bytes of storages that are alive."""
        self.peak = 0
        """Largest value of ``live``, in bytes."""
        self.flops = 0
        """Floating-point operations of matrix products, convolutions and attention."""
        self._seen: set[int] = set()

    def track(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count tensors that exist already; return their bytes."""
        before = self.live
        for tensor in tensors:
            self._add(tensor)
        return self.live - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = self._masked(*args) if func is INDEX else None
        result = func(*args, **(kwargs or {})) if kept is None else kept
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result

    def _masked(self, values: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Return ``values[mask]`` of fake tensors, whose mask has no values; None for any other index."""
        mask = indices[0]
        if not is_fake(values) or mask is None or mask.dtype != torch.bool:
            return None
        kept = values.narrow(mask.dim() - 1, 0, min(self.num_kept or 10**9, mask.shape[-1]))
        return kept.reshape(-1, *values.shape[mask.dim() :]).clone()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def materialize(module: torch.nn.Module, device: torch.device) -> None:
    """Replace a module's tensors on ``meta`` by tensors of the device: fake ones inside ``FakeTensorMode``."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                each._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty_like(buffer, device=device)
