"""Targets and masks compared with the papers' formulas in float64, from the betas on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_dag.diffusion.objectives import FlowMatching, make_objective, masked_mean
from tests.helpers.errors import refused
from tests.helpers.objectives import KINDS, NUM_TRAIN_TIMESTEPS, TIMESTEPS, draws, reference_target, scheduler, zero_snr


@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_target_is_the_formula(kind: str, timesteps: list[int]) -> None:
    latents, noise = draws(len(timesteps))
    found = make_objective(scheduler(kind)).target(latents, noise, torch.tensor(timesteps))
    expected = reference_target(kind, latents.double().numpy(), noise.double().numpy(), timesteps)
    assert found.dtype == torch.float32 and found.shape == latents.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_v_equals_get_velocity_of_diffusers() -> None:
    timesteps = torch.tensor([0, 500, 999])
    latents, noise = draws(3)
    found = make_objective(scheduler("v_prediction")).target(latents, noise, timesteps)
    assert torch.equal(found, scheduler("v_prediction").get_velocity(latents, noise, timesteps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [0, 20, 500, 999])
def test_a_scheduler_step_with_the_target_returns_the_clean_latents(kind: str, timestep: int) -> None:
    """DDPM's own formula turns noisy latents and the target back into the clean latents."""
    noise_scheduler = scheduler(kind)
    noise_scheduler.register_to_config(clip_sample=False)
    latents, noise = draws(1)
    noisy_latents = noise_scheduler.add_noise(latents, noise, torch.tensor([timestep]))
    target = make_objective(noise_scheduler).target(latents, noise, torch.tensor([timestep]))
    found = noise_scheduler.step(target, timestep, noisy_latents).pred_original_sample
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=1e-3)


def test_unknown_prediction_type_is_named() -> None:
    with refused("unknown-prediction-type", "model.pretrained", "'flow'", "epsilon, v_prediction, sample"):
        make_objective(scheduler("flow"))


# Zero terminal SNR: data of the scheduler


def test_the_last_step_of_zero_terminal_snr_is_pure_noise_with_target_minus_latents() -> None:
    """Lin et al. 2024 (arXiv:2305.08891), section 3.1 and 3.2."""
    latents, noise = draws(2)
    last = torch.tensor([999, 999])
    noise_scheduler = zero_snr("v_prediction")
    assert torch.equal(make_objective(noise_scheduler).add_noise(latents, noise, last), noise)
    assert torch.equal(make_objective(noise_scheduler).target(latents, noise, last), -latents)


# Flow matching


def flow(shift: float = 1.0, **options: bool) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=shift, **options)


def reference_sigma(timesteps: list[int], shift: float) -> np.ndarray:
    """Return sigma by Esser et al. 2024, eq. 23, in float64; the lowest is of a thousandth."""
    share = (np.array(timesteps) + 1) / NUM_TRAIN_TIMESTEPS
    return shift * share / (1 + (shift - 1) * share)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
def test_flow_matching_is_the_formula(timesteps: list[int], shift: float) -> None:
    latents, noise = draws(len(timesteps))
    noise_scheduler, asked = flow(shift), torch.tensor(timesteps)
    sigma = reference_sigma(timesteps, shift)
    x, eps, s = latents.double().numpy(), noise.double().numpy(), sigma[:, None, None, None]
    np.testing.assert_allclose(FlowMatching(noise_scheduler).sigmas(asked).numpy(), sigma, rtol=1e-6)
    np.testing.assert_allclose(make_objective(noise_scheduler).model_timesteps(asked).numpy(), 1000 * sigma, rtol=1e-6)
    found = make_objective(noise_scheduler).add_noise(latents, noise, asked)
    np.testing.assert_allclose(found.numpy(), (1 - s) * x + s * eps, atol=1e-6)
    target = make_objective(noise_scheduler).target(latents, noise, asked)
    assert found.dtype == target.dtype == torch.float32
    np.testing.assert_allclose(target.numpy(), eps - x, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_equals_scale_noise_of_diffusers(shift: float) -> None:
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    latents, noise = draws(5)
    told = make_objective(flow(shift)).model_timesteps(timesteps)
    expected = flow(shift).scale_noise(latents, told, noise)
    assert torch.equal(make_objective(flow(shift)).add_noise(latents, noise, timesteps), expected)


def test_an_euler_step_along_the_target_ends_at_the_image() -> None:
    """The target is the velocity of the straight path (Lipman et al. 2023): one step of -sigma takes all noise away."""
    latents, noise = draws(1)
    noise_scheduler = flow()
    noise_scheduler.set_timesteps(10)
    target = make_objective(noise_scheduler).target(latents, noise, torch.tensor([999]))
    sample = noise
    for timestep in noise_scheduler.timesteps:
        sample = noise_scheduler.step(target, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, atol=1e-5, rtol=1e-4)


# Masks


def random_errors(count: int, channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared errors [B, C, h, w] and masks [B, 1, h, w] from 0 to 1."""
    generator = torch.Generator().manual_seed(3)
    errors = torch.randn(count, channels, height, width, generator=generator).square()
    return errors, torch.rand(count, 1, height, width, generator=generator)


def masked_mean_by_hand(errors: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the masked mean of one sample [C, h, w] in float64, pixel by pixel."""
    total = covered = 0.0
    channels, height, width = errors.shape
    for c, y, x in np.ndindex(channels, height, width):
        total += float(mask[0, y, x]) * float(errors[c, y, x])
        covered += float(mask[0, y, x])
    return total / covered


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 5, 7), (2, 1, 8, 3)], ids=str)
def test_masked_mean_equals_the_formula(shape: tuple[int, int, int, int]) -> None:
    errors, masks = random_errors(*shape)
    masks[0, 0, 0, 0] = 1.0
    masks[masks < 0.4] = 0.0
    found = masked_mean(errors, masks)
    assert found.shape == shape[:1] and found.dtype == torch.float32
    expected = [masked_mean_by_hand(error, mask) for error, mask in zip(errors, masks, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_mask_of_ones_or_of_any_constant_is_the_plain_mean() -> None:
    errors, masks = random_errors(4, 4, 8, 12)
    plain = masked_mean(errors, None)
    np.testing.assert_allclose(plain.numpy(), errors.double().mean((1, 2, 3)).numpy(), rtol=1e-5)
    assert torch.equal(masked_mean(errors, torch.ones_like(masks)), plain)  # to the bit, on a CPU
    torch.testing.assert_close(masked_mean(errors, torch.full_like(masks, 0.01)), plain)


def test_errors_under_black_do_not_count_and_a_small_mask_counts_in_full() -> None:
    errors = torch.full((1, 4, 8, 8), 1e6)
    errors[..., 2, 3] = 0.5
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., 2, 3] = 1.0
    assert masked_mean(errors, masks).tolist() == [0.5]
    wide = torch.full((1, 4, 8, 8), 0.5)
    assert masked_mean(wide, torch.ones_like(masks)).tolist() == [0.5]


def test_gradient_is_zero_under_black() -> None:
    errors, masks = random_errors(2, 4, 6, 6)
    masks[:, :, :3] = 0.0
    errors.requires_grad_(True)
    masked_mean(errors, masks).sum().backward()
    assert errors.grad is not None and not errors.grad[:, :, :3].any() and errors.grad[:, :, 3:].all()
