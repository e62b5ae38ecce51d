"""Progress of the stage, counted in passes of the denoiser: rows of the evaluation set and sampling steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dag.core.progress import Bar
from stages.validate import unquantized

if TYPE_CHECKING:
    from lora_dag.artifacts.adapter import Adapter
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams


@dataclass(frozen=True)
class Plan:
    """Work of ``score_snapshots`` for base, snapshots and final adapter, without cache hits."""

    num_losses: int
    num_images: int
    num_passes: int
    """Passes of the denoiser, one for each loss and one or two for each step of an image."""


def plan(eval_set: EvalSet, adapter: Adapter, settings: ValidateParams) -> Plan:
    """Count the losses and samples of all states."""
    num_snapshots, num_prompts = len(adapter.snapshots), len(settings.prompts)
    num_scaled = sum(scale != 1 for scale in settings.scales)
    num_losses = len(eval_set.rows) * (2 + num_snapshots) + 2 * settings.num_timesteps * len(settings.drift_prompts)
    if unquantized.is_measured(eval_set, settings):
        num_losses += len(unquantized.heldout(eval_set).rows)
    num_images = num_prompts * (2 * settings.num_seeds + num_snapshots + num_scaled) + len(settings.drift_prompts)
    return Plan(num_losses, num_images, num_losses + num_images * passes_per_image(eval_set, settings))


def passes_per_image(eval_set: EvalSet, settings: ValidateParams) -> int:
    """Return the passes of the denoiser per generated image. Guidance needs two per step."""
    return settings.num_inference_steps * (2 if is_guided(eval_set, settings) else 1)


def is_guided(eval_set: EvalSet, settings: ValidateParams) -> bool:
    """Return whether images are generated with classifier-free guidance."""
    limit = eval_set.family.NO_GUIDANCE
    return limit is not None and settings.guidance_scale > limit


class Passes:
    """A progress bar that a hook on the denoiser advances, also inside a pipeline's sampling loop."""

    def __init__(self, bar: Bar, denoiser: Any) -> None:
        self.bar, self.end = bar, 0
        bar.start()
        denoiser.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch_size = len(args[0] if args else next(iter(kwargs.values())))  # a batch, or a list of images
        self.bar.add(min(batch_size, self.end - self.bar.done))

    @contextlib.contextmanager
    def segment(self, size: int) -> Iterator[None]:
        """Enclose work of ``size`` passes; work without any pass is a cache hit and is skipped on the bar."""
        before, self.end = self.bar.done, self.bar.done + size
        yield
        if self.bar.done == before:
            self.bar.skip(size)
        else:
            self.bar.add(self.end - self.bar.done)
