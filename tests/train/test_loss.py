"""Weights and pseudo-Huber losses against the papers' formulas in float64, starting from the betas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_dag.core.console import UserError
from lora_dag.diffusion.objectives import Epsilon, FlowMatching, VPrediction, make_objective
from stages.train.loss import Loss, elementwise_errors, require_snr
from tests.helpers.errors import assert_problem, refused
from tests.helpers.objectives import KINDS, TIMESTEPS, alpha_bar, draws, reference_target, scheduler, zero_snr
from tests.helpers.settings import train_params

GAMMA = 5.0
WEIGHTINGS = ("min_snr", "soft_min_snr", "debiased", "p2")


def loss_weights(noise_scheduler: DDPMScheduler, timesteps: list[int], name: str) -> torch.Tensor:
    gamma = [f"snr_gamma={GAMMA}"] if "min_snr" in name else []
    return loss(noise_scheduler, f"loss_weighting={name}", *gamma).weights(torch.tensor(timesteps))


def loss(noise_scheduler: DDPMScheduler, *changes: str) -> Loss:
    return Loss(make_objective(noise_scheduler), train_params(*changes))


def on_epsilon(name: str, ratio: float) -> float:
    """Return each paper's weight of the epsilon loss; ``ratio`` is the SNR."""
    return {
        "min_snr": min(1.0, GAMMA / ratio),
        "soft_min_snr": 1 / (1 / ratio + 1 / GAMMA) / ratio,
        "debiased": 1 / math.sqrt(ratio),
        "p2": 1 / (1 + ratio),
    }[name]


@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
def test_snr_equals_the_formula(timesteps: list[int]) -> None:
    signal = alpha_bar(timesteps)
    found = Epsilon(scheduler("epsilon")).snr(torch.tensor(timesteps))
    np.testing.assert_allclose(found.numpy(), signal / (1 - signal), rtol=1e-3)


@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_for_epsilon_equal_the_papers(name: str, timesteps: list[int]) -> None:
    found = loss_weights(scheduler("epsilon"), timesteps, name)
    ratios = [float(signal / (1 - signal)) for signal in alpha_bar(timesteps)]
    assert found.dtype == torch.float32 and found.shape == (len(timesteps),)
    np.testing.assert_allclose(found.numpy(), [on_epsilon(name, ratio) for ratio in ratios], rtol=1e-3)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_error_of_the_image_has_one_weight_for_every_prediction_type(name: str) -> None:
    """An error in x0 has other sizes in epsilon and v; the weights undo that (Hang et al. 2023, section 3.4)."""
    timesteps = [0, 100, 600, 999]
    latents, noise = draws(4)
    weighted = []
    for kind in KINDS:
        noise_scheduler = scheduler(kind)
        noisy_latents = noise_scheduler.add_noise(latents, noise, torch.tensor(timesteps)).double().numpy()
        signal = alpha_bar(timesteps)[:, None, None, None]
        wrong_latents = latents.double().numpy() + 0.1
        wrong_noise = (noisy_latents - np.sqrt(signal) * wrong_latents) / np.sqrt(1 - signal)
        model_pred = reference_target(kind, wrong_latents, wrong_noise, timesteps)
        target = make_objective(noise_scheduler).target(latents, noise, torch.tensor(timesteps)).numpy()
        losses = ((model_pred - target) ** 2).mean((1, 2, 3))
        weighted.append(losses * loss_weights(noise_scheduler, timesteps, name).numpy())
    np.testing.assert_allclose(weighted[0], weighted[2], rtol=5e-3)
    np.testing.assert_allclose(weighted[1], weighted[2], rtol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_weights_are_one(kind: str) -> None:
    found = loss_weights(scheduler(kind), [0, 999], "uniform")
    assert found.dtype == torch.float32 and found.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "p2"])
@pytest.mark.parametrize(("kind", "last"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_weights_are_finite_under_zero_terminal_snr(kind: str, last: float, name: str) -> None:
    found = loss_weights(zero_snr(kind), [0, 500, 999], name)
    assert found.isfinite().all() and found[-1] == last


def test_snr_settings_reject_flow_matching() -> None:
    flow = FlowMatchEulerDiscreteScheduler(1000)
    asked = train_params("loss_weighting=p2", "huber_c=0.1", "huber_schedule=snr")
    with pytest.raises(UserError) as caught:
        require_snr(FlowMatching(flow), asked)
    assert caught.value.codes == ("needs-snr", "needs-snr")
    assert_problem(caught.value, "needs-snr", "--set train.loss_weighting: p2", "flow_prediction", "uniform")
    assert_problem(caught.value, "needs-snr", "--set train.huber_schedule: snr", "exponential or constant")
    with refused("weight-not-finite", "train.loss_weighting: debiased", "epsilon", "soft_min_snr"):
        require_snr(Epsilon(zero_snr("epsilon")), train_params("loss_weighting=debiased"))
    require_snr(VPrediction(zero_snr("v_prediction")), train_params("loss_weighting=debiased"))
    require_snr(FlowMatching(flow), train_params())


# Pseudo-Huber


def reference_c(schedule: str, timestep: int, c: float) -> float:
    signal = alpha_bar([timestep])[0]
    sigma = math.sqrt((1 - signal) / signal)
    return {
        "constant": c,
        "exponential": math.exp(math.log(c) * timestep / 1000),
        "snr": (1 - c) / (1 + sigma) ** 2 + c,
    }[schedule]


@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_c_equals_the_formula(schedule: str, timesteps: list[int]) -> None:
    settings = ("huber_c=0.1", f"huber_schedule={schedule}")
    found = loss(scheduler("epsilon"), *settings).huber_c(torch.tensor(timesteps))
    assert found is not None and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [reference_c(schedule, t, 0.1) for t in timesteps], rtol=1e-3)


def test_pseudo_huber_equals_the_formula_and_its_limits() -> None:
    model_pred, target = draws(2)
    c = torch.tensor([0.1, 0.7])
    found = elementwise_errors(model_pred, target, c).double().numpy()
    x = (model_pred - target).double().numpy()
    wide = np.array([0.1, 0.7])[:, None, None, None]
    np.testing.assert_allclose(found, 2 * wide * (np.sqrt(x**2 + wide**2) - wide), atol=1e-6)
    small, large = torch.full((1, 1, 1, 1), 1e-2), torch.full((1, 1, 1, 1), 1e3)
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1)
    assert elementwise_errors(small, zero, one).item() == pytest.approx(1e-4, rel=2e-2)
    assert elementwise_errors(large, zero, one).item() == pytest.approx(2e3, rel=2e-3)


def test_without_c_errors_are_squared() -> None:
    model_pred, target = draws(2)
    assert loss(scheduler("epsilon")).huber_c(torch.tensor([3])) is None
    assert torch.equal(elementwise_errors(model_pred, target, None), (model_pred - target).square())


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        (["loss_weighting=min_snr"], "missing-setting", ["params.yaml train.snr_gamma: ", "min_snr", "5.0"]),
        (["snr_gamma=5.0"], "setting-ignored", ["--set train.snr_gamma: 5.0", "loss_weighting uniform", "null"]),
        (["huber_schedule=snr"], "missing-setting", ["params.yaml train.huber_c: ", "huber_schedule snr", "0.1"]),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: list[str], code: str, values: list[str]) -> None:
    with refused(code, *values):
        train_params(*changes)
