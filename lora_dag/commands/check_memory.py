"""Memory and arithmetic of a run for `lora-dag check`, counted before any weight is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dag.bases import component_files
from lora_dag.core import kept_digests
from lora_dag.core.console import Problem, UserError, log, plural, warn
from lora_dag.core.params import Config, ModelParams, RuntimeParams, params_class
from lora_dag.families.protocol import Family, load_family
from stages.cache_latents.params import CacheParams
from stages.train.params import TrainParams

if TYPE_CHECKING:
    import torch

    from lora_dag.commands.forecast import Forecast, Size, TrainStep

PROGRAM = 0.6e9
"""Bytes of Python, torch and diffusers without a model: peak of a process that imports them, on Linux."""

REMEDIES = {
    "cache_latents": "Use -S cache.batch_size=1.",
    "validate": "Use -S validate.batch_size=1.",
}
"""Stage -> advice if it does not fit. train has its own, and export can run in main memory."""


def check_memory(
    config: Config, configs: ModelParams, size: Size, captions: list[str], device: torch.device, limit: float | None
) -> None:
    """Log the memory of the stages and the arithmetic; warn if the memory is too small.

    Args:
        size: width and height of the largest images, in pixels.
        limit: bytes of the memory to fit into; None for the device's own.
    """
    from lora_dag.commands.forecast import Forecast

    family = load_family(configs.family)
    config = config.replaced(configs)
    num_tokens = max(family.count_tokens(configs, captions or [""]))
    forecast = Forecast(config, family, size, num_tokens, device)
    step = forecast.train()
    peaks = {
        "cache_latents": forecast.cache_latents(),
        "train": step.peak,
        "validate": forecast.validate(),
        "export at most": forecast.export(),
    }
    log.info("memory      %s", ", ".join(f"{stage} {gigabytes(peak)}" for stage, peak in peaks.items()))
    log.info("            %s", describe(step))
    num_steps = config.section(TrainParams).num_steps
    log.info("arithmetic  %s per step, %s in all", flops(step.flops), flops(step.flops * num_steps))
    announce_time(config, configs, family, size, device)
    log_disk(config, forecast, captions)
    available = limit or memory_of(device)
    if step.peak > available:
        warn("memory-short", shortage(step, available, smaller(config, family, forecast, available)))
    for stage, remedy in REMEDIES.items():
        if peaks[stage] > available:
            needs = f"{stage} needs about {gigabytes(peaks[stage])}, but only {gigabytes(available)} are available."
            warn("memory-short", Problem("memory-short", f"{needs} {remedy}"))


def announce_time(config: Config, configs: ModelParams, family: Family, size: Size, device: torch.device) -> None:
    """Log how long the training takes by the last one here, if there was one and its base's digest is kept."""
    from lora_dag.core.device import speed_conditions
    from stages.train.build import training_work

    folder = Path(configs.pretrained) / family.DENOISER
    with contextlib.suppress(OSError, UserError):  # the weights are not here yet
        files = component_files.loaded_files(folder, configs.variant)
        if not all(kept_digests.kept(path.stat()) for path in files):
            return
        digest = component_files.digest(folder, configs.variant)
        scale = family.vae_scale_factor(configs)
        train, runtime = config.section(TrainParams), config.section(RuntimeParams)
        work = training_work(
            train, size[0] * size[1] / scale**2, speed_conditions(device, configs, digest), runtime.num_processes
        )
        work.announce(what=f" for {plural(train.num_steps, 'step')} of training")


def log_disk(config: Config, forecast: Forecast, captions: list[str]) -> None:
    """Log the size of the cached latents and captions."""
    view, caption = forecast.entry_sizes()
    size = len(captions) * config.section(CacheParams).num_variants * view + (len(set(captions)) + 1) * caption
    log.info("cache       about %s in data/latents, and as much in the store and in DVC's cache", gigabytes(size))


def describe(step: TrainStep) -> str:
    """Return the parts of the memory of a training step."""
    parts = {
        "frozen weights": step.frozen,
        "adapter": step.adapter,
        "gradients": step.gradients,
        "optimizer": step.state,
        "activations": step.activations,
    }
    return "train: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def memory_of(device: torch.device) -> float:
    """Return the bytes that a stage can use: the GPU's memory, or main memory without the program itself."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total - PROGRAM


def smaller(
    config: Config, family: Family, forecast: Forecast, available: float
) -> tuple[dict[str, object], TrainStep]:
    """Return the first settings that fit, or the smallest ones, and their step.

    Each costs more than the one before: checkpointing time, smaller batches with the same images per step more time,
    quantization accuracy.
    """
    from lora_dag.commands.forecast import Forecast

    changes: dict[str, object] = {}
    for more in reductions(config):
        changes |= more
        changed = config
        for key, value in changes.items():
            section, _, name = key.partition(".")
            own = changed.section(params_class(section))
            changed = changed.replaced(own.model_copy(update={name: value}))
        step = Forecast(changed, family, forecast.size, forecast.num_tokens, forecast.device).train()
        if step.peak <= available:
            break
    return changes, step


def reductions(config: Config) -> Iterator[dict[str, object]]:
    """Yield settings that save memory, to be added one after the other."""
    train, model = config.section(TrainParams), config.section(ModelParams)
    yield {"train.gradient_checkpointing": True}
    size, accumulation = train.batch_size, train.gradient_accumulation_steps
    while size > 1:
        half = size // 2 if size % 2 == 0 else 1
        size, accumulation = half, accumulation * size // half
        yield {"train.batch_size": size, "train.gradient_accumulation_steps": accumulation}
    if model.quantization is None:
        yield {"model.quantization": "int8"}
    if model.quantization != "nf4":
        yield {"model.quantization": "nf4"}


def shortage(step: TrainStep, available: float, fitting: tuple[dict[str, object], TrainStep]) -> Problem:
    changes, smaller_step = fitting
    line = " ".join(f"-S {key}={str(value).lower()}" for key, value in changes.items())
    needs = f"train needs about {gigabytes(step.peak)}, but only {gigabytes(available)} are available."
    if smaller_step.peak > available:
        return Problem("memory-short", f"{needs} With {line} it still needs {gigabytes(smaller_step.peak)}.")
    return Problem("memory-short", f"{needs} Use {line}: {gigabytes(smaller_step.peak)}.")


def flops(count: float) -> str:
    """Return floating-point operations with three digits and a unit."""
    size, unit = next(
        pair for pair in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")) if count >= pair[0] or pair[0] == 1e9
    )
    return f"{count / size:.3g} {unit}"


def gigabytes(size: float) -> str:
    """Return bytes as MB or GB (10^9) with three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
