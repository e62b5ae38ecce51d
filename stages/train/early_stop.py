"""An end before ``train.num_steps``, where the held-out loss of every snapshot has stopped falling.

The held-out pictures are scored as the training scores its own: view, caption, noise and timestep of every row are
drawn in the training's way, once, so that each snapshot is scored on the same rows. They decide when to end and nothing
else; the adapter has the bytes of the snapshot that an undisturbed run keeps at that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lora_dag.core.console import UserError, log
from stages.train.batches import Batch, Batches

if TYPE_CHECKING:
    from lora_dag.artifacts.latent_cache import CachedItem

MAX_PICTURES = 64
NUM_DRAWS = 4
"""Rows per picture, a forward pass each: of 64 pictures as many as about seven training steps at batch 16."""
NO_STEP = -1
"""Keys the rows' draws: no training step has that number."""


class HeldoutRows:
    """Held-out pictures with their draws.

    Raises:
        UserError: no picture is held out.
    """

    def __init__(self, training: Batches) -> None:
        found = [item for item in training.cache.split("heldout") if not item.regularization]
        if not found:
            none = "no picture is held out (dataset.heldout_fraction)"
            raise UserError(f"params.yaml train.early_stop_patience: {none}; hold some out, or set this to null")
        items = sorted(found, key=lambda item: (item.content, item.file_name))[:MAX_PICTURES]
        self.source = training.of(items, prompt_dropout=0.0)
        first = {item: index * NUM_DRAWS for index, item in enumerate(items)}
        self.rows: list[list[tuple[CachedItem, int]]] = [
            [(item, first[item] + draw) for item in bucket.items for draw in range(NUM_DRAWS)]
            for bucket in self.source.order.buckets
        ]

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def batches(self) -> Iterator[Batch]:
        """Made anew each time: prompt embeddings of all rows at once would fill the memory.

        Every batch is full, as in training and as compiled blocks need it; the rows that fill one up have no weight.
        """
        size = self.source.params.batch_size
        for rows in self.rows:
            for start in range(0, len(rows), size):
                samples = [self.source.sample(item, NO_STEP, slot) for item, slot in rows[start : start + size]]
                filling = replace(samples[-1], weights=torch.zeros(1))
                samples += [filling] * (size - len(samples))
                yield Batch.cat(samples).to(self.source.device)


class EarlyStop:
    """Held-out losses by step, and whether ``patience`` snapshots in a row were no better than the best before them."""

    def __init__(self, rows: HeldoutRows, patience: int) -> None:
        self.rows, self.patience = rows, patience
        self.losses: dict[int, float] = {}

    def is_over(self, step: int, loss: float) -> bool:
        """Note the held-out loss of the snapshot of this step."""
        self.losses[step] = loss if math.isfinite(loss) else math.inf
        best = min(self.losses, key=lambda known: (self.losses[known], known))
        log.info(
            "held-out    step %d: loss %.6f; lowest %.6f at step %d", step, self.losses[step], self.losses[best], best
        )
        over = sum(known > best for known in self.losses) >= self.patience
        if over:
            log.info("early stop  at step %d; for the best: dvc exp run -S export.step=%d", step, best)
        return over

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]
