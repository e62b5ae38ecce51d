"""Memory and arithmetic of a run for `lora-dag check`, counted before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_dag.core.console import Problem, log, warn
from lora_dag.core.params import Config, ModelParams
from lora_dag.families.protocol import Family, load_family
from stages.train.params import TrainParams

if TYPE_CHECKING:
    import torch

    from lora_dag.commands.forecast import Forecast, Size, TrainStep

PROGRAM = 0.6e9
"""Bytes of Python, torch and diffusers without a model: peak of a process that imports them, on Linux."""


def check_memory(
    config: Config, configs: ModelParams, size: Size, captions: list[str], device: torch.device, limit: float | None
) -> None:
    """Log the memory of cache_latents and train and the arithmetic; warn if the memory is too small.

    Args:
        size: width and height of the largest images, in pixels.
        limit: bytes of the memory to fit into; None for the device's own.
    """
    from lora_dag.commands.forecast import Forecast

    family = load_family(configs.family)
    config = config.replaced(configs)
    num_tokens = max(family.count_tokens(configs, captions or [""]))
    forecast = Forecast(config, family, size, num_tokens, device)
    step, cache = forecast.train(), forecast.cache_latents()
    log.info("memory      cache_latents %s, train %s", gigabytes(cache), gigabytes(step.peak))
    log.info("            %s", describe(step))
    num_steps = config.section(TrainParams).num_steps
    log.info("arithmetic  %s per step, %s in all", flops(step.flops), flops(step.flops * num_steps))
    available = limit or memory_of(device)
    if step.peak > available:
        warn("memory-short", shortage(step, available, smaller(config, family, forecast, available)))


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

    Each costs more time than the one before: checkpointing, then smaller batches with the same images per step.
    """
    from lora_dag.commands.forecast import Forecast

    train = config.section(TrainParams)
    changes: dict[str, object] = {"gradient_checkpointing": True}
    size, accumulation = train.batch_size, train.gradient_accumulation_steps
    while True:
        changed = config.replaced(train.model_copy(update=changes))
        step = Forecast(changed, family, forecast.size, forecast.num_tokens, forecast.device).train()
        if step.peak <= available or size == 1:
            return changes, step
        half = size // 2 if size % 2 == 0 else 1
        size, accumulation = half, accumulation * size // half
        changes |= {"batch_size": size, "gradient_accumulation_steps": accumulation}


def shortage(step: TrainStep, available: float, fitting: tuple[dict[str, object], TrainStep]) -> Problem:
    changes, smaller_step = fitting
    line = " ".join(f"-S train.{name}={str(value).lower()}" for name, value in changes.items())
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
