"""Check that two trainings compute the same: one records its random draws and losses, the other replays the draws.

Both use the same adapter at the start and the same images, noise and timesteps at each step. Latents are the
posterior's mean on both sides. Each side computes everything else itself: decoding, crop and encoding of an image,
captions, noisy latents, target, loss, gradients and the optimizer's step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


class Recorder:
    """Draws and results of a training. The file is rewritten at every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Tensors = {}
        self.captions: dict[int, list[str]] = {}
        self.losses: list[float] = []

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        self.tensors |= {f"start.{index}": tensor.detach().clone() for index, tensor in enumerate(trained(optimizer))}

    def step_done(self, optimizer: torch.optim.Optimizer) -> None:
        end = {f"end.{index}": tensor.detach() for index, tensor in enumerate(trained(optimizer))}
        captions = [self.captions[step] for step in sorted(self.captions)]
        save_file(self.tensors | end, self.path, {"captions": json.dumps(captions), "losses": json.dumps(self.losses)})


def trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def record(path: Path, draws: bool) -> Recorder:
    """Record the training that this process starts next.

    Args:
        draws: also what our trainer draws, one micro-batch per step; its latents lose their spread.
    """
    recorder = Recorder(path)
    record_losses(recorder)
    if draws:
        record_draws(recorder)
    return recorder


def record_losses(recorder: Recorder) -> None:
    from accelerate import Accelerator

    backward = Accelerator.backward

    def recorded(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        recorder.losses.append(float(loss.detach()))
        backward(self, loss, **kwargs)

    Accelerator.backward = recorded


def record_draws(recorder: Recorder) -> None:
    from lora_dag.artifacts.latent_cache import LatentCache
    from stages.train.batches import Batches, BatchOrder

    latents, items, batch = LatentCache.latents, BatchOrder.items, Batches.batch

    def mean_alone(self: LatentCache, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = latents(self, key)
        return mean, torch.zeros_like(std)

    def recorded_items(self: BatchOrder, number: int) -> list[Any]:
        found = items(self, number)
        recorder.captions[number] = [item.caption for item in found]
        return found

    def recorded_batch(self: Batches, step: int, micro: int) -> Any:
        found = batch(self, step, micro)
        recorder.tensors |= {f"noise.{step}": found.noise, f"timesteps.{step}": found.timesteps}
        return found

    LatentCache.latents, BatchOrder.items, Batches.batch = mean_alone, recorded_items, recorded_batch  # type: ignore[method-assign]


def replay(path: Path) -> Callable[[torch.optim.Optimizer], None]:
    """Make the script that this process starts next use the draws recorded in ``path``.

    Returns:
        What gives its optimizer's parameters their recorded start.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        captions = json.loads(file.metadata()["captions"])
    replay_images(captions)
    replay_noise(tensors)

    def start(optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for index, parameter in enumerate(trained(optimizer)):
                parameter.copy_(tensors[f"start.{index}"])

    return start


def replay_images(captions: list[list[str]]) -> None:
    """Yield the images in the recorded order, once. Each image has its own caption."""
    from torch.utils.data import RandomSampler

    def in_order(self: RandomSampler) -> Iterator[int]:
        place = {caption: index for index, caption in enumerate(self.data_source.with_format(None)["text"])}
        return iter([place[caption] for batch in captions for caption in batch])

    RandomSampler.__iter__ = in_order  # type: ignore[method-assign]


def replay_noise(tensors: Tensors) -> None:
    """Replace the script's only draws in a step: ``randn_like`` of the latents and ``randint`` of the timesteps."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    num_steps = sum(name.startswith("noise.") for name in tensors)
    noise = iter([tensors[f"noise.{step}"] for step in range(num_steps)])
    timesteps = iter([tensors[f"timesteps.{step}"] for step in range(num_steps)])
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    torch.randn_like = lambda like, **options: next(noise).to(like)
    torch.randint = lambda *args, **options: next(timesteps)


def differences(ours: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of a step's loss, and of the final adapters relative to the distance that ours
    moved.
    """
    with safe_open(ours, "pt") as a, safe_open(other, "pt") as b:
        losses = [json.loads(file.metadata()["losses"]) for file in (a, b)]
        names = [name.removeprefix("end.") for name in a.keys() if name.startswith("end.")]  # noqa: SIM118
        moved = sum((a.get_tensor(f"end.{n}") - a.get_tensor(f"start.{n}")).double().square().sum() for n in names)
        apart = sum((a.get_tensor(f"end.{n}") - b.get_tensor(f"end.{n}")).double().square().sum() for n in names)
    largest = max(abs(one - two) for one, two in zip(*losses, strict=True))
    return largest, float(torch.as_tensor(apart / moved).sqrt())
