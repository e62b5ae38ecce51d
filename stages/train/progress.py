"""How far a training is: its history, one bar on a terminal, an aligned line every so often elsewhere, a tracker."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from lora_dag.core.console import log
from lora_dag.core.progress import SECONDS, lines_above
from lora_dag.core.took import duration

SMOOTHING = 50  # steps that the shown loss is the mean of
Row = tuple[float, float, float]  # loss, learning rate, gradient norm


class History:
    """A row for every step so far."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        self.rows.append((loss, learning_rate, grad_norm))

    def state_dict(self) -> dict[str, list[Row]]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, list[Row]]) -> None:
        self.rows = [tuple(row) for row in state["rows"]]  # type: ignore[misc]


def smoothed_loss(history: list[Row]) -> float:
    recent = [loss for loss, _, _ in history[-SMOOTHING:]]
    return sum(recent) / len(recent)


class Progress:
    """Of one process in a training: ``start`` is the step that it began or resumed at."""

    def __init__(self, accelerator: Any, *, start: int, num_steps: int, images_per_step: int, every: int) -> None:
        self.accelerator, self.start, self.num_steps = accelerator, start, num_steps
        self.images_per_step, self.every = images_per_step, every
        self.began = self.said = time.monotonic()
        self.bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty() or not accelerator.is_main_process,
        )
        self.logging = contextlib.ExitStack()
        self.logging.enter_context(lines_above(self.bar))

    def init_trackers(self, settings: dict[str, Any]) -> None:
        """Below logs/, without a network: wandb offline unless WANDB_MODE says otherwise."""
        os.environ.setdefault("WANDB_MODE", "offline")
        dvclive = {"dir": "logs/dvclive", "dvcyaml": None, "report": None, "save_dvc_exp": False}
        known = {name: value for name, value in settings.items() if value is not None}
        self.accelerator.init_trackers("lora-dag", known, {"wandb": {"dir": "logs"}, "dvclive": dvclive})

    def step(self, history: list[Row]) -> None:
        """After a step: ``history`` holds a row for each one so far."""
        done = len(history)
        loss, rate, norm = history[-1]
        self.accelerator.log({"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": norm}, step=done)
        self.bar.update()
        is_first = self.said == self.began and time.monotonic() >= self.began + SECONDS  # slow steps: do not wait
        if done % self.every and done != self.num_steps and not is_first:
            return
        self.said = time.monotonic()
        images, smoothed = self.images_per_second(done), smoothed_loss(history)
        eta = duration((self.num_steps - done) * self.images_per_step / images)
        if self.bar.disable:
            line = "step %6d  loss %.4f  lr %.2e  grad_norm %7.4f  %6.1f images/s  ETA %s"
            log.info(line, done, smoothed, rate, norm, images, eta)
        else:
            self.bar.set_postfix(loss=f"{smoothed:.4f}", lr=f"{rate:.1e}", images_per_s=f"{images:.0f}")

    def images_per_second(self, done: int) -> float:
        return (done - self.start) * self.images_per_step / max(time.monotonic() - self.began, 1e-9)

    def end(self, done: int) -> dict[str, float]:
        """Close bar and trackers after the last step; return what run.json keeps."""
        self.bar.close()
        self.logging.close()
        self.accelerator.end_training()
        return {
            "images_per_second": round(self.images_per_second(done), 1),
            "resumed_from_step": self.start,
            "seconds": round(time.monotonic() - self.began, 1),
        }
