"""How a training shows itself: one bar on a terminal, one aligned line every n steps elsewhere, and the tracker."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from stages.core.console import log

SMOOTHING = 50  # steps that the shown loss is the mean of
Row = tuple[float, float, float]  # loss, learning rate, gradient norm


def smoothed_loss(history: list[Row]) -> float:
    recent = [loss for loss, _, _ in history[-SMOOTHING:]]
    return sum(recent) / len(recent)


class Progress:
    """Of one process: ``start`` is the step that it began or resumed at."""

    def __init__(self, accelerator: Any, *, start: int, num_steps: int, images_per_step: int, every: int) -> None:
        self.accelerator, self.start, self.num_steps = accelerator, start, num_steps
        self.images_per_step, self.every = images_per_step, every
        self.began = time.monotonic()
        self.bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty() or not accelerator.is_main_process,
        )

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
        if done % self.every and done != self.num_steps:
            return
        images, smoothed = self.images_per_second(done), smoothed_loss(history)
        eta = (self.num_steps - done) * self.images_per_step / images
        if self.bar.disable:
            line = "step %6d  loss %.4f  lr %.2e  grad_norm %7.4f  %6.1f images/s  ETA %4.0f s"
            log.info(line, done, smoothed, rate, norm, images, eta)
        else:
            self.bar.set_postfix(loss=f"{smoothed:.4f}", lr=f"{rate:.1e}", images_per_s=f"{images:.0f}")

    def images_per_second(self, done: int) -> float:
        return (done - self.start) * self.images_per_step / max(time.monotonic() - self.began, 1e-9)

    def end(self, done: int) -> dict[str, float]:
        """Close bar and trackers after the last step; return what run.json keeps."""
        self.bar.close()
        self.accelerator.end_training()
        return {
            "images_per_second": round(self.images_per_second(done), 1),
            "resumed_from_step": self.start,
            "seconds": round(time.monotonic() - self.began, 1),
        }
