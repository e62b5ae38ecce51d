"""Embeddings of captions as files hold them: in the encoder's dtype and without zeros at their end, without loss.

An encoder in bfloat16 gives values that bfloat16 holds exactly; ``encode_prompts`` returns them in float32. A family
whose denoiser ignores padding has zeros behind a caption's own tokens. Families whose denoiser attends to padding have
other values there, which stay. ``pack`` compares every bit, and keeps a tensor that would change as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLOAT32, PACKED = 1, 2
"""Forms of embeddings: all in float32 and full length, as in earlier versions; or as ``pack`` returns them."""
SHAPE = ".shape"
"""Suffix of the name of an int64 tensor: the full shape of a tensor without the zeros at its end."""


def form_of(dtype: str) -> int:
    """Return the form of embeddings that an encoder in this dtype makes; float32 keeps the form of all versions."""
    return FLOAT32 if dtype == "float32" else PACKED


def pack(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return the embeddings of one caption in their smallest exact form.

    Args:
        tensors: name -> float32 [...].
        dtype: name of the encoder's dtype, such as ``bfloat16``.
    """
    import torch

    packed = {}
    for name, tensor in tensors.items():
        own = own_part(tensor)
        if own.shape != tensor.shape:
            packed[name + SHAPE] = torch.tensor(tensor.shape)
        narrow = own.to(getattr(torch, dtype))
        packed[name] = narrow if same_bits(narrow.float(), own) else own
    return packed


def unpack(packed: torch.Tensor, shape: torch.Tensor | None) -> torch.Tensor:
    """Return the values that ``pack`` had in full length, in the packed dtype.

    Args:
        shape: its full shape, int64 [number of dimensions]; None if nothing was cut.
    """
    if shape is None:
        return packed
    full = packed.new_zeros(shape.tolist())
    full[tuple(map(slice, packed.shape))] = packed
    return full


def names(packed: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the sorted names of the embeddings, without those of their shapes."""
    return sorted(name for name in packed if not name.endswith(SHAPE))


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without the zeros at the end of each dimension; -0.0 is no zero."""
    import torch

    used = tensor.contiguous().view(torch.int32) != 0
    ends = []
    for dim, size in enumerate(tensor.shape):
        indices = used.movedim(dim, 0).reshape(size, -1).any(dim=1).nonzero()
        ends.append(int(indices[-1]) + 1 if len(indices) else 0)
    return tensor[tuple(map(slice, ends))]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two float32 tensors of one shape are equal in every bit."""
    import torch

    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
