"""How much of an examination is done, counted in the denoiser's passes: table rows and sampling steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_dag.core.progress import Bar

if TYPE_CHECKING:
    from lora_dag.artifacts.adapter import Adapter
    from stages.validate.heldout_loss import EvalSet
    from stages.validate.params import ValidateParams


def planned(eval_set: EvalSet, adapter: Adapter, settings: ValidateParams) -> int:
    """Of all that ``score_snapshots`` asks of base, snapshots and final adapter."""
    num_snapshots, num_drawn = len(adapter.snapshots), len(settings.prompts)
    num_scaled = sum(scale != 1 for scale in settings.scales)
    num_rows = len(eval_set.rows) * (2 + num_snapshots) + 2 * settings.num_timesteps * len(settings.drift_prompts)
    num_pictures = num_drawn * (2 * settings.num_seeds + num_snapshots + num_scaled) + len(settings.drift_prompts)
    return num_rows + num_pictures * per_picture(eval_set, settings)


def per_picture(eval_set: EvalSet, settings: ValidateParams) -> int:
    """Guidance shows the denoiser everything twice."""
    limit = eval_set.family.NO_GUIDANCE
    return settings.num_inference_steps * (2 if limit is not None and settings.guidance_scale > limit else 1)


class Passes:
    """A bar that a hook on the denoiser moves, so that it also moves inside of a pipeline's loop."""

    def __init__(self, bar: Bar, denoiser: Any) -> None:
        self.bar, self.end = bar, 0
        bar.start()
        denoiser.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        shown = len(args[0] if args else next(iter(kwargs.values())))  # a batch, or a list of pictures
        self.bar.add(min(shown, self.end - self.bar.done))

    @contextlib.contextmanager
    def part(self, size: int) -> Iterator[None]:
        """Around what takes ``size`` passes, or none where earlier runs left what it makes."""
        before, self.end = self.bar.done, self.bar.done + size
        yield
        if self.bar.done == before:
            self.bar.skip(size)
        else:
            self.bar.add(self.end - self.bar.done)
