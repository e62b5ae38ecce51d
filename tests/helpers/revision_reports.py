"""Runs with given losses of their held-out images, as compare reads them."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dag.commands.compare.revision_report import RevisionReport
from lora_dag.evaluation.heldout_table import Score

BASE = {"vae": "v", "scheduler": "s"}
INPUTS = {"base": BASE, "dataset": {"content": "c"}, "latents": "l", "validate": {"seed": 0, "num_timesteps": 2}}


def side(losses: Sequence[float], alpha: int = 8, seed: int = 0, name: str = "") -> RevisionReport:
    """A run with these losses of its held-out images."""
    scores = [
        Score(f"{index}-{t}", f"{index}.png", "heldout", t, 1.0, loss)
        for index, loss in enumerate(losses)
        for t in (1, 9)
    ]
    params = {"lora.alpha": alpha, "train.seed": seed}
    return RevisionReport(name or f"alpha-{alpha}-{seed}", None, params, {}, scores, INPUTS, b"", None, None)
