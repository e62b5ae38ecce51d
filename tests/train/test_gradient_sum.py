"""Sums of gradients are bit-identical for every order and number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from stages.train.gradient_sum import GradientSum, require_same
from tests.helpers.errors import refused


def gradients(count: int, scale: float = 1.0) -> list[list[torch.Tensor | None]]:
    """Return gradients of ``count`` micro-batches for three parameters; the last parameter has none."""
    generator = torch.Generator().manual_seed(5)
    return [
        [scale * torch.randn(3, 4, generator=generator), 1e-6 * torch.randn(5, generator=generator), None]
        for _ in range(count)
    ]


def summed(parts: list[list[torch.Tensor | None]], order: tuple[int, ...]) -> list[torch.Tensor | None]:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2,))]
    total = GradientSum(parameters, len(parts))
    for index in order:
        for parameter, gradient in zip(parameters, parts[index], strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        total.add()
        assert all(parameter.grad is None for parameter in parameters)
    losses = torch.tensor([1.0, 0.5])
    assert not total.reduce(losses, False) and losses.tolist() == [1.0, 0.5]
    return [parameter.grad for parameter in parameters]


def test_the_sum_is_bit_identical_for_every_order() -> None:
    parts = gradients(4)
    first = summed(parts, (0, 1, 2, 3))
    for order in itertools.permutations(range(4)):
        found = summed(parts, order)
        assert all(
            torch.equal(a, b) for a, b in zip(found[:2], first[:2], strict=True) if a is not None and b is not None
        )
    plain = [sum(part[0] for part in (parts[i] for i in order)) for order in itertools.permutations(range(4))]  # type: ignore[misc]
    assert any(not torch.equal(plain[0], other) for other in plain)  # type: ignore[arg-type]


def test_the_sum_is_exact_up_to_one_rounding() -> None:
    parts = gradients(4)
    found = summed(parts, (2, 0, 3, 1))
    for index in (0, 1):
        exact = torch.stack([part[index].double() for part in parts]).sum(0)  # type: ignore[union-attr]
        assert found[index] is not None
        torch.testing.assert_close(found[index].double(), exact, rtol=1e-7, atol=4 * 2.0**-45)  # type: ignore[union-attr]


def test_gradients_of_a_single_micro_batch_are_unchanged() -> None:
    """They are not rounded: 1e-20 is below the resolution of the sum."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1e-20, 1e9])
    alone = GradientSum([parameter], 1)
    alone.add()
    losses = torch.tensor([2.0])
    assert alone.reduce(losses, True) and not alone.reduce(losses, False) and losses.tolist() == [2.0]
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.tensor([1e-20, 1e9]))


def test_a_parameter_without_gradient_keeps_none() -> None:
    assert summed(gradients(2), (0, 1))[2] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_an_overflow_becomes_nan(bad: float) -> None:
    parts = gradients(2)
    parts[1][0][0, 0] = bad  # type: ignore[index]
    found = summed(parts, (0, 1))
    assert all(bool(gradient.isnan().all()) for gradient in found if gradient is not None)


@pytest.mark.parametrize("theirs", [["digest", 2], ["another", 2], ["digest", None]])
def test_processes_with_different_states_are_refused(theirs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(found: list[object], value: object) -> None:
        found[:] = [value, theirs]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    if theirs == ["digest", 2]:
        return require_same(["digest", 2])
    with refused("processes-differ", "$LORA_STATE_DIR"):
        require_same(["digest", 2])
