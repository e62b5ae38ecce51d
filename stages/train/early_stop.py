"""Early stop: a run ends before ``train.num_steps`` once the held-out loss of the snapshots no longer decreases.

The held-out loss is the training loss on held-out images. View, caption, noise and timestep of every row are drawn once
with the training's settings, so that all snapshots are scored on the same rows. The rows only decide when to end: the
adapter is bit-identical to the snapshot of a full run at that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.core.console import Problem, UserError, log
from stages.train.batches import Batch, Batches

if TYPE_CHECKING:
    from lora_dag.artifacts.latent_cache import CachedItem

MAX_IMAGES = 64
NUM_DRAWS = 4
"""Rows per image. 64 images take as many forward passes as about seven training steps at batch size 16."""
NO_STEP = -1
"""Step number in the seeds of the rows' random numbers; no training step has it."""


class HeldoutRows:
    """Rows of held-out images, each with fixed random numbers.

    Raises:
        UserError: no image is held out.
    """

    def __init__(self, training: Batches) -> None:
        heldout = [item for item in training.cache.split("heldout") if not item.regularization]
        if not heldout:
            setting = training.params.setting("early_stop_patience")
            text = f"{setting}: no image is held out. Raise dataset.heldout_fraction, or set this to null."
            raise UserError(Problem("no-heldout-images", text))
        items = sorted(heldout, key=lambda item: (item.content, item.file_name))[:MAX_IMAGES]
        self.source = training.with_items(items, prompt_dropout=0.0)
        first = {item: index * NUM_DRAWS for index, item in enumerate(items)}
        self.rows: list[list[tuple[CachedItem, int]]] = [
            [(item, first[item] + draw) for item in bucket.items for draw in range(NUM_DRAWS)]
            for bucket in self.source.order.buckets
        ]

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def batches(self) -> Iterator[Batch]:
        """Yield full batches of all rows; they are made again each time to save memory.

        Compiled blocks need full batches. Rows that only fill up a batch have weight 0.
        """
        size = self.source.params.batch_size
        for rows in self.rows:
            for start in range(0, len(rows), size):
                samples = [self.source.sample(item, NO_STEP, slot) for item, slot in rows[start : start + size]]
                filling = replace(samples[-1], weights=torch.zeros(1))
                samples += [filling] * (size - len(samples))
                yield Batch.cat(samples).to(self.source.device)


class EarlyStop:
    """Held-out losses by step. A run ends after ``patience`` snapshots in a row without a new lowest loss."""

    def __init__(self, rows: HeldoutRows, patience: int) -> None:
        self.rows, self.patience = rows, patience
        self.losses: dict[int, float] = {}

    def should_stop(self, step: int, loss: float) -> bool:
        """Record the held-out loss of a snapshot and return whether the run ends here."""
        self.losses[step] = loss if math.isfinite(loss) else math.inf
        best = min(self.losses, key=lambda earlier: (self.losses[earlier], earlier))
        line = "held-out    step %d  loss %.6f  (lowest %.6f at step %d)"
        log.info(line, step, self.losses[step], self.losses[best], best)
        is_over = sum(later > best for later in self.losses) >= self.patience
        if is_over:
            log.info("early stop  at step %d. To export the best snapshot: dvc exp run -S export.step=%d", step, best)
        return is_over

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]
