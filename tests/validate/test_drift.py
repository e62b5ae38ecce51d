"""DriftBaseline against stock diffusers: what the base drew, asked of base and adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from lora_dag.artifacts import metrics
from lora_dag.core import params, seeding
from lora_dag.evaluation import heldout_table
from stages.validate.params import ValidateParams
from tests.helpers.validated import write_adapter
from tests.helpers.workspace import Workspace


def stock_losses(prompts: list[str]) -> list[float]:
    """Loss of each row of the base, by the stock pipeline's own components."""
    settings = params.load(Path("params.yaml")).section(ValidateParams)
    pipe = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    found = []
    for prompt in prompts:
        generator = seeding.generator(0, "sample", prompt)
        drawn: Image.Image = pipe(prompt, height=32, width=32, generator=generator, **options).images[0]
        pixels = torch.tensor(np.array(drawn) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            vae: AutoencoderKL = pipe.vae
            latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
            states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        for stratum, t in enumerate(
            heldout_table.stratified_timesteps(0, f"drift {prompt}", settings.num_timesteps, 1000)
        ):
            generator = seeding.generator(0, "validate-noise", f"drift {prompt}", stratum)
            noise, step = torch.randn(latents.shape[1:], generator=generator)[None], torch.tensor([t])
            with torch.no_grad():
                model_pred = pipe.unet(pipe.scheduler.add_noise(latents, noise, step), step, states).sample
            velocity = pipe.scheduler.get_velocity(latents, noise, step)
            found.append(float((model_pred - velocity).double().square().mean()))
    return found


def test_drift_equals_an_independent_computation_on_the_bases_images(cached: Workspace) -> None:
    write_adapter(0.3)
    cached.run("validate")
    measured = metrics.load(Path("reports/metrics.json"))
    expected = np.mean(stock_losses(["red apple", "green circle"]))
    assert measured["drift.loss_base"] == pytest.approx(expected, rel=2e-3)  # the samples are rounded to 8 bits
    change = measured["drift.loss_change"]
    assert change == pytest.approx(measured["drift.loss"] - measured["drift.loss_base"], rel=1e-3)  # type: ignore[operator]
    assert measured["drift.loss_change_low"] <= change <= measured["drift.loss_change_high"]  # type: ignore[operator]


def test_drift_needs_prompts(cached: Workspace) -> None:
    write_adapter(0.3)
    lines = cached.run("validate", "--set", "validate.drift_prompts=[]", "--set", "validate.num_seeds=1")
    measured = metrics.load(Path("reports/metrics.json"))
    assert not any(name.startswith("drift") for name in measured) and not any(
        line.startswith("drift") for line in lines
    )
    assert measured["samples.diversity"] is None and measured["samples.copied_share"] is not None


def test_drift_includes_trained_text_encoders(cached: Workspace) -> None:
    """The denoiser's own adapter is untrained: what changes comes from the prompts, encoded anew under the adapter."""
    cached.run("train", "--set", "lora.train_text_encoder=true", "--set", "train.text_encoder_lr=0.1")
    cached.run("validate", "--set", "lora.train_text_encoder=true")
    measured = metrics.load(Path("reports/metrics.json"))
    assert measured["drift.loss_base"] == pytest.approx(np.mean(stock_losses(["red apple", "green circle"])), rel=2e-3)
    assert measured["drift.loss_change"] != 0
