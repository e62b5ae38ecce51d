"""An end before ``train.num_steps``: held-out loss, asked at every snapshot, has stopped falling.

The held-out pictures are asked as the training asks its own: view, caption, noise and timestep of every row are draws
of the training's own, made once, so that each snapshot answers the same rows. When to end is all that they decide;
the adapter has the bytes of the snapshot that an undisturbed run keeps at that step.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from lora_dag.core.console import UserError, log
from stages.train.batches import Batch, Batches, by_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lora_dag.artifacts.latent_cache import CachedItem, LatentCache
    from stages.train.noising import Timesteps
    from stages.train.params import TrainParams
    from stages.train.trainer import Trainer

MAX_PICTURES = 64
NUM_DRAWS = 4
"""Rows per picture, a forward pass each: of 64 pictures as many as about seven training steps at batch 16."""
NO_STEP = -1
"""Keys the rows' draws: no training step has that number."""


class EarlyStop:
    """Held-out losses by step, and whether ``patience`` snapshots in a row were no better than the best before them.

    Raises:
        UserError: no picture is held out.
    """

    def __init__(
        self,
        patience: int,
        cache: LatentCache,
        params: TrainParams,
        timesteps: Timesteps,
        device: torch.device,
        drops_to_zeros: bool,
    ) -> None:
        found = [item for item in cache.split("heldout") if not item.regularization]
        if not found:
            none = "no picture is held out (dataset.heldout_fraction)"
            raise UserError(f"params.yaml train.early_stop_patience: {none}; hold some out, or set this to null")
        items = sorted(found, key=lambda item: (item.content, item.file_name))[:MAX_PICTURES]
        asked = params.model_copy(update={"prompt_dropout": 0.0})
        self.patience, self.batch_size = patience, params.batch_size
        self.batches = Batches(cache, items, asked, timesteps, device, drops_to_zeros)
        first = {item: index * NUM_DRAWS for index, item in enumerate(items)}
        self.rows: list[list[tuple[CachedItem, int]]] = [
            [(item, first[item] + draw) for item in bucket.items for draw in range(NUM_DRAWS)]
            for bucket in by_shape(cache, items)
        ]
        self.losses: dict[int, float] = {}

    def is_over(self, trainer: Trainer, step: int) -> bool:
        """Ask the adapter as it is kept at this step."""
        loss = [total_loss(trainer, self.questions()) / self.num_rows]
        if trainer.accelerator.num_processes > 1:
            broadcast_object_list(loss)  # all end at the same step whatever their devices' last bits
        self.losses[step] = loss[0] if math.isfinite(loss[0]) else math.inf
        best = min(self.losses, key=lambda known: (self.losses[known], known))
        log.info(
            "held-out    step %d: loss %.6f; lowest %.6f at step %d", step, self.losses[step], self.losses[best], best
        )
        over = sum(known > best for known in self.losses) >= self.patience
        if over:
            log.info("early stop  at step %d; for the best: dvc exp run -S export.step=%d", step, best)
        return over

    def questions(self) -> Iterator[Batch]:
        """Made anew each time: prompt embeddings of all rows at once would fill the memory.

        Every batch is full, as in training, which compiled blocks want; what fills one up has no weight.
        """
        for rows in self.rows:
            for start in range(0, len(rows), self.batch_size):
                samples = [
                    self.batches.sample(item, NO_STEP, slot) for item, slot in rows[start : start + self.batch_size]
                ]
                filling = replace(samples[-1], weights=torch.zeros(1))
                samples += [filling] * (self.batch_size - len(samples))
                yield Batch.cat(samples).to(self.batches.device)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows))


def total_loss(trainer: Trainer, batches: Iterable[Batch]) -> float:
    """Sum of the training's own loss over all rows, under the weights that would be saved, without dropout."""
    with torch.no_grad(), trainer.kept.weights(), evaluating(trainer.adapted.modules.values()):
        return math.fsum(float(trainer.loss(batch, NO_STEP, 0)) * len(batch.captions) for batch in batches)


@contextlib.contextmanager
def evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
