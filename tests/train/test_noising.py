"""Timesteps against their distribution functions, and noises against their formulas."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lora_dag.core import seeding
from stages.train import noising
from tests.helpers.errors import refused
from tests.helpers.settings import train_params

DDPM = DDPMScheduler(1000)
DYNAMIC = FlowMatchEulerDiscreteScheduler(1000, use_dynamic_shifting=True)
NUM_DRAWS = 4000
SHAPE = torch.Size((4, 9, 6))


def draw(purpose: str) -> torch.Generator:
    return seeding.generator(0, purpose, 3, 1)


def shares(*changes: str, num_tokens: int = 256, scheduler: DDPMScheduler = DDPM) -> np.ndarray:
    """Return sorted draws, divided by 1000."""
    timesteps = noising.make_timesteps(train_params(*changes), scheduler)
    found = [int(timesteps.draw(seeding.generator(0, "t", i), num_tokens)) for i in range(NUM_DRAWS)]
    return np.sort((np.array(found) + 0.5) / 1000)


def distance(found: np.ndarray, cumulative: list[float]) -> float:
    """Return the Kolmogorov-Smirnov distance; 0.03 occurs once in 700 samples of 4000."""
    return float(np.abs((np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS - np.array(cumulative)).max())


def test_uniform_timesteps_are_one_draw() -> None:
    timesteps = noising.make_timesteps(train_params(), DDPM)
    for step in range(5):
        expected = torch.randint(1000, (), generator=seeding.generator(0, "timestep", step, 0))
        assert timesteps.draw(seeding.generator(0, "timestep", step, 0), 64) == expected


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.5)])
def test_logit_normal_timesteps_have_the_distribution(mean: float, std: float) -> None:
    found = shares("timestep_sampling=logit_normal", f"logit_mean={mean}", f"logit_std={std}")
    assert distance(found, [NormalDist(mean, std).cdf(math.log(t / (1 - t))) for t in found]) < 0.03


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_a_shift_maps_uniform_timesteps(shift: float) -> None:
    """Esser et al. 2024, eq. 23; its inverse is the distribution function."""
    found = shares(f"timestep_shift={shift}")
    assert distance(found, [t / (shift - (shift - 1) * t) for t in found]) < 0.03


def test_auto_shift_equals_the_schedulers() -> None:
    """The reference is the scheduler's sigmas with the mu of FLUX's pipeline."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    shift = noising.make_shift(train_params("timestep_shift=auto"), DYNAMIC)
    for num_tokens in (256, 1024, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(1000, use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=[0.25, 0.5, 0.75], mu=calculate_shift(num_tokens))
        s, t = shift(num_tokens), np.array([0.25, 0.5, 0.75])
        np.testing.assert_allclose(scheduler.sigmas[:3], s * t / (1 + (s - 1) * t), rtol=1e-6)


def test_auto_without_dynamic_shifting_is_refused() -> None:
    with refused("no-dynamic-shift", "train.timestep_shift: auto", "DDPMScheduler", "1.0"):
        noising.make_timesteps(train_params("timestep_shift=auto"), DDPM)


@pytest.mark.parametrize("more", [[], ["timestep_sampling=logit_normal", "logit_std=4.0"], ["timestep_shift=5.0"]])
def test_a_range_applies_to_every_sampling(more: list[str]) -> None:
    found = shares("timestep_range=[0.25, 0.5]", *more)
    assert found.min() > 0.25 and found.max() < 0.5
    assert found.min() < 0.27 and found.max() > 0.48


def test_an_empty_range_is_refused() -> None:
    with refused("empty-timestep-range", "train.timestep_range: got [0.5, 0.5]", "[0.0, 1.0]"):
        train_params("timestep_range=[0.5, 0.5]")
    with refused("empty-timestep-range", "train.timestep_range: [0.5, 0.5001]", "1000"):
        noising.make_timesteps(train_params("timestep_range=[0.5, 0.5001]"), DDPM)


# Noise


def test_default_noise_is_one_draw() -> None:
    noise, added = noising.draw_noise(draw, SHAPE, train_params())
    assert torch.equal(noise, torch.randn(SHAPE, generator=draw("noise"))) and added is noise


def test_an_offset_shifts_whole_channels() -> None:
    plain, _ = noising.draw_noise(draw, SHAPE, train_params())
    noise, added = noising.draw_noise(draw, SHAPE, train_params("noise_offset=0.05"))
    shifts = (noise - plain).flatten(1)
    assert torch.equal(noise, added)
    assert shifts.std(1).max() < 1e-6
    expected = 0.05 * torch.randn(4, 1, 1, generator=draw("noise-offset")).flatten()
    torch.testing.assert_close(shifts[:, 0], expected, atol=1e-6, rtol=1e-4)


def test_a_perturbation_is_added_but_not_predicted() -> None:
    plain, _ = noising.draw_noise(draw, SHAPE, train_params())
    noise, added = noising.draw_noise(draw, SHAPE, train_params("input_perturbation=0.1"))
    assert torch.equal(noise, plain)
    assert float((added - noise).std()) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 1), (16, 8, 128)], ids=str)
def test_multi_resolution_noise_has_a_std_of_one_and_more_of_it_in_large_areas(shape: tuple[int, int, int]) -> None:
    noise, _ = noising.draw_noise(draw, torch.Size(shape), train_params("multires_noise_discount=0.8"))
    assert noise.shape == shape and noise.dtype == torch.float32
    assert float(noise.std()) == pytest.approx(1.0, abs=1e-5)
    if shape[-1] > 1:
        wide = torch.Size((64, 32, 32))
        coarse, _ = noising.draw_noise(draw, wide, train_params("multires_noise_discount=0.8"))
        plain, _ = noising.draw_noise(draw, wide, train_params())
        assert coarse.mean((1, 2)).std() > 4 * plain.mean((1, 2)).std()
