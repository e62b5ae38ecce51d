"""EMA against a loop in float64; the two sets of weights of schedule-free; trained weights are restored."""

from __future__ import annotations

import pytest
import torch

from stages.train import optimizers
from stages.train.averaging import AveragedWeights
from tests.helpers.settings import train_params

CPU = torch.device("cpu")


def run(changes: list[str], steps: int) -> tuple[AveragedWeights, torch.nn.Parameter, list[torch.Tensor]]:
    """Return the weights after each step, in float64."""
    asked = train_params("lr_scheduler=constant", "learning_rate=0.1", *changes)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = optimizers.make_optimizer(asked, {"a.lora_A.default.weight": parameter}, {}, CPU)
    averaged = AveragedWeights(asked, [parameter], optimizer)
    passed = []
    for _ in range(steps):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
        averaged.step()
        passed.append(parameter.detach().double().clone())
    return averaged, parameter, passed


def inside(averaged: AveragedWeights, parameter: torch.nn.Parameter) -> torch.Tensor:
    with averaged.swapped_in():
        return parameter.detach().double().clone()


@pytest.mark.parametrize("power", [None, 2 / 3])
def test_ema_equals_the_formula_and_trained_weights_are_restored(power: float | None) -> None:
    changes = ["ema_decay=0.6", *([] if power is None else [f"ema_power={power}"])]
    averaged, parameter, passed = run(changes, 12)
    average = torch.tensor([1.0, -2.0, 3.0]).double()
    for step, weights in enumerate(passed):
        ramp = (1 + step) / (10 + step) if power is None else 1 - (1 + step) ** -power
        decay = min(ramp, 0.6) if step else 0.0
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(inside(averaged, parameter), average, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameter.detach().double(), passed[-1])


def test_without_an_average_the_last_weights_are_saved() -> None:
    averaged, parameter, passed = run([], 3)
    assert torch.equal(inside(averaged, parameter), passed[-1]) and averaged.state_dict() == {}


def test_schedule_free_saves_its_average_without_changing_the_training() -> None:
    averaged, parameter, passed = run(["optimizer=schedule_free", "weight_decay=0"], 5)
    seen = inside(averaged, parameter)
    assert not torch.equal(seen, passed[-1]) and torch.equal(parameter.detach().double(), passed[-1])
    assert averaged.schedule_free.param_groups[0]["train_mode"]
    state = averaged.schedule_free.state[parameter]
    beta = 0.9  # y = (1 - beta) z + beta x (Defazio et al. 2024, arXiv:2405.15682, eq. 3); x is what is used
    torch.testing.assert_close((1 - beta) * state["z"].double() + beta * seen, passed[-1], rtol=1e-5, atol=1e-6)


def test_a_resumed_ema_is_bit_identical() -> None:
    averaged, parameter, _ = run(["ema_decay=0.6"], 4)
    other, _, _ = run(["ema_decay=0.6"], 0)
    other.parameters = [torch.nn.Parameter(parameter.detach().clone())]
    other.load_state_dict(averaged.state_dict())
    for each in (averaged, other):
        with torch.no_grad():
            each.parameters[0].mul_(1.7)
        each.step()
    assert torch.equal(inside(averaged, averaged.parameters[0]), inside(other, other.parameters[0]))


def test_a_resumed_ema_is_on_the_device_of_the_parameters() -> None:
    """A checkpoint is loaded to the CPU; the meta device simulates a GPU."""
    averaged, _, _ = run(["ema_decay=0.6"], 2)
    elsewhere = torch.nn.Parameter(torch.empty(3, device="meta"))
    other = AveragedWeights(train_params("ema_decay=0.6"), [elsewhere], None)
    other.load_state_dict(averaged.state_dict())
    other.step()
    assert other.ema is not None and other.ema.shadow_params[0].device.type == "meta"
