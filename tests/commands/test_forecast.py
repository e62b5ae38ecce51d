"""The counted memory of a training step, against that of a real step as torch's profiler measures it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_dag.adapters import lora
from lora_dag.adapters.adapter_set import AdapterSet
from lora_dag.adapters.params import LoraParams
from lora_dag.commands.forecast import Forecast
from lora_dag.core import device, params
from lora_dag.core.params import FAMILIES, Config, ModelParams
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import common
from lora_dag.families.protocol import load_family
from stages.train import optimizers
from stages.train.batches import Batch
from stages.train.loss import Loss
from stages.train.params import TrainParams
from tests.helpers.workspace import REPOSITORY, Workspace

CPU = torch.device("cpu")
CAPTION = "a red apple"


def settings(base: Path, family: str, *changes: str) -> Config:
    words = [f"model.family={family}", f"model.pretrained={base}", "lora.rank=4", "lora.alpha=4", *changes]
    path = REPOSITORY / "params.yaml"
    return params.load(path, words)


class RealStep:
    """A training step of a loaded base, with a batch of 64 x 64 pixels."""

    def __init__(self, config: Config) -> None:
        self.model, self.params = config.section(ModelParams), config.section(TrainParams)
        self.family = load_family(self.model.family)
        self.denoiser = self.family.load_denoiser(self.model, CPU)
        lora_config = lora.make_config(config.section(LoraParams), self.denoiser)
        self.trainable = AdapterSet(self.denoiser, lora_config, {}, {}).trainable
        if self.params.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.loss = Loss(make_objective(self.family.load_scheduler(self.model)), self.params)
        self.optimizer = optimizers.make_optimizer(self.params, self.trainable, {}, CPU)
        text, vae = self.family.load_text(self.model, CPU), self.family.load_vae(self.model, CPU)
        with torch.no_grad():
            self.latents = self.family.encode_images(vae, torch.zeros(1, 3, 64, 64))[0].clone()
            self.prompt = self.family.encode_prompts(text, [CAPTION])
        view = self.family.view_conditioning((64, 64), (0, 0), (64, 64))
        self.prompt |= {name: value[None] for name, value in view.items()}

    def run(self) -> None:
        size = self.params.batch_size

        def repeated(value: torch.Tensor) -> torch.Tensor:
            return value.repeat(size, *[1] * (value.dim() - 1))

        latents = repeated(self.latents)
        batch = Batch(
            latents=latents,
            noise=torch.randn_like(latents),
            added_noise=torch.randn_like(latents),
            timesteps=torch.full((size,), 5),
            captions=[CAPTION] * size,
            prompt={name: repeated(value) for name, value in self.prompt.items()},
            weights=torch.ones(size),
            masks=None,
        )
        with device.autocast(CPU, self.model):
            model_pred = self.family.predict(self.denoiser, batch.latents, batch.timesteps, batch.prompt)
        self.loss(model_pred, batch).mean().backward()
        del model_pred
        torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.params.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self) -> int:
        """Return the peak of the second step."""
        self.run()
        return measured_peak(self.run)


def measured_peak(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that a function allocates and holds, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    events: list[Any] = [each for each in measured.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        ["model.dtype=float32"],
        ["model.dtype=bfloat16"],
        ["model.dtype=float32", "train.gradient_checkpointing=true"],
        ["model.dtype=float32", "model.quantization=int8"],
        ["model.dtype=bfloat16", "model.quantization=nf4"],
    ],
    ids=["float32", "bfloat16", "checkpointing", "int8", "nf4"],
)
def test_a_step_takes_the_counted_memory(bases: dict[str, Path], name: str, changes: list[str]) -> None:
    config = settings(bases[name], name, "train.batch_size=4", *changes)
    family, model = load_family(name), config.section(ModelParams)
    (num_tokens,) = family.count_tokens(model, [CAPTION])
    counted = Forecast(config, family, (64, 64), num_tokens, CPU).train()
    step = RealStep(config)
    tensors = (*step.denoiser.parameters(), *step.denoiser.buffers())
    assert counted.frozen == sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)
    assert counted.adapter == sum(4 * parameter.numel() for parameter in step.trainable.values())
    # A processor without bfloat16 computes in float32 inside of its kernels, whose memory is not counted.
    is_native = model.dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert counted.activations + counted.gradients == pytest.approx(step.peak(), rel=0.1 if is_native else 0.25)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_stages_take_the_counted_memory(bases: dict[str, Path], name: str, dtype: str) -> None:
    config = settings(bases[name], name, f"model.dtype={dtype}", "cache.batch_size=4", "validate.batch_size=2")
    family, model = load_family(name), config.section(ModelParams)
    forecast = Forecast(config, family, (64, 64), 8, CPU)
    vae_model = model.model_copy(update={"dtype": family.vae_dtype(model)})
    denoiser, vae = family.load_denoiser(model, CPU), family.load_vae(vae_model, CPU)

    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    with common.weightless() as built:
        text = family.load_text(model, CPU)
    text_size = size(*built)
    text = family.load_text(model, CPU)
    with device.autocast(CPU, vae_model):
        images = size(vae) + measured_peak(lambda: family.encode_images(vae, torch.zeros(4, 3, 64, 64)))
        view = family.encode_images(vae, torch.zeros(1, 3, 64, 64))
        decode = measured_peak(lambda: family.decode_latents(vae, view[0]))
    with torch.no_grad(), device.autocast(CPU, model):
        captions = text_size + measured_peak(lambda: family.encode_prompts(text, [CAPTION] * 4))
        prompt = family.encode_prompts(text, [CAPTION])
    assert forecast.entry_sizes()[0] == sum(tensor.nbytes for tensor in view)
    conditioning = family.view_conditioning((64, 64), (0, 0), (64, 64))
    assert forecast.entry_sizes()[1] == sum(
        each.numel() * getattr(torch, dtype).itemsize for each in (*prompt.values(), *conditioning.values())
    )
    # Without gradients, a convolution needs memory for one more activation inside its kernel.
    assert forecast.cache_latents() == pytest.approx(max(images, captions), rel=0.2)
    share = 0.8 if dtype == "float32" else 0.75
    assert forecast.validate() >= size(denoiser, vae) + share * decode
    assert forecast.export() == max(4 * sum(p.numel() for p in denoiser.parameters()), text_size)


def test_accumulated_gradients_are_summed_in_64_bits(bases: dict[str, Path]) -> None:
    one = Forecast(settings(bases["sd"], "sd"), load_family("sd"), (64, 64), 5, CPU).train()
    four = settings(bases["sd"], "sd", "train.gradient_accumulation_steps=4")
    summed = Forecast(four, load_family("sd"), (64, 64), 5, CPU).train()
    assert (one.gradients, summed.gradients) == (one.adapter, 3 * one.adapter)
    assert summed.flops == 4 * one.flops


@pytest.mark.slow
def test_check_suggests_settings_that_fit(workspace: Workspace) -> None:
    def warning(*words: str) -> str:
        done = workspace.process("check", "--set", "train.batch_size=6", *words)
        return next((line for line in done.stdout.splitlines() if line.startswith("warning: train needs")), "")

    short = warning("--memory", "0.004")
    suggested = [word for word in short.split() if word.startswith("train.") and "=" in word]
    assert suggested[0] == "train.gradient_checkpointing=true"
    assert warning("--memory", "0.004", *(f"--set={word.rstrip(':')}" for word in suggested)) == ""
