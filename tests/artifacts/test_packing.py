"""Embeddings in their smallest form: every bit comes back, and what a smaller form would change stays as it is."""

from __future__ import annotations

import pytest
import torch

from lora_dag.artifacts import packing


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return float32 values that ``dtype`` holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).float()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.dtype == torch.float32
    return tensor.view(torch.int32)


def check(tensor: torch.Tensor, dtype: str, kept: torch.dtype, shape: tuple[int, ...]) -> None:
    packed = packing.pack({"x": tensor}, dtype)
    assert packing.names(packed) == ["x"]
    assert packed["x"].dtype == kept and packed["x"].shape == shape
    assert ("x.shape" in packed) == (shape != tensor.shape)
    found = packing.unpack(packed["x"], packed.get("x.shape"))
    assert found.dtype == kept and torch.equal(bits(found.float()), bits(tensor))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_of_the_encoders_dtype_take_half(dtype: str) -> None:
    kept = getattr(torch, dtype)
    check(values(7, 5, dtype=kept), dtype, kept, (7, 5))
    check(values(5, dtype=kept), dtype, kept, (5,))
    check(torch.full((2, 3), 2.0**-24), dtype, kept, (2, 3))  # the smallest float16


@pytest.mark.parametrize("value", [1 + 2.0**-23, 2.0**-149, 3.0e38, 1 / 3])
def test_one_value_that_would_change_keeps_float32(value: float) -> None:
    for dtype in ("bfloat16", "float16"):
        tensor = values(7, 5)
        tensor[3, 2] = value
        check(tensor, dtype, torch.float32, (7, 5))
    check(values(7, 5), "float32", torch.float32, (7, 5))


def test_zeros_at_the_end_of_every_dimension_are_left_out() -> None:
    tensor = torch.zeros(9, 8, 7)
    tensor[:4, :, :3] = values(4, 8, 3)
    check(tensor, "bfloat16", torch.bfloat16, (4, 8, 3))
    check(torch.tensor([1.0, 0, 1, 0, 0]), "bfloat16", torch.bfloat16, (3,))
    check(torch.zeros(4, 3), "bfloat16", torch.bfloat16, (0, 0))
    check(torch.zeros(4), "float32", torch.float32, (0,))


def test_a_negative_zero_is_a_value() -> None:
    tensor = torch.zeros(4, 3)
    tensor[2, 1] = -0.0
    check(tensor, "bfloat16", torch.bfloat16, (3, 2))


def test_tensors_in_any_memory_order() -> None:
    check(values(6, 4).t(), "bfloat16", torch.bfloat16, (4, 6))
