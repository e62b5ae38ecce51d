"""Progress of a training: history, a bar on a terminal or aligned lines elsewhere, and a tracker."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from lora_dag.core.console import log
from lora_dag.core.progress import SECONDS, lines_above
from lora_dag.core.time_estimate import duration

SMOOTHING = 50  # number of steps in the mean of the logged loss
BAR = "step {n_fmt}/{total_fmt} {bar} {desc}"  # with all numbers it fits 80 columns
Row = tuple[float, float, float]  # loss, learning rate, gradient norm


class History:
    """Loss, learning rate and gradient norm of every finished step."""

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
    """Return the mean loss of the last SMOOTHING steps."""
    losses = [loss for loss, _, _ in history[-SMOOTHING:]]
    return sum(losses) / len(losses)


def bar_text(loss: float, rate: float, grad_norm: float, images_per_second: float, eta: str) -> str:
    """Return the numbers beside the bar, short enough for 80 columns."""
    speed = f"{images_per_second:.0f}" if images_per_second >= 10 else f"{images_per_second:.1f}"
    return f"loss {loss:.4f} lr {rate:.1e} grad_norm {grad_norm:.2f} {speed} images/s ETA {eta}"


class Progress:
    """Progress of one process.

    Args:
        start: step at which the process started or resumed.
        every: number of steps between two lines of the log.
    """

    def __init__(self, accelerator: Any, *, start: int, num_steps: int, images_per_step: int, every: int) -> None:
        self.accelerator, self.start, self.num_steps = accelerator, start, num_steps
        self.images_per_step, self.every = images_per_step, every
        self.started = self.last_logged = time.monotonic()
        self.bar = tqdm(
            total=num_steps,
            initial=start,
            bar_format=BAR,
            disable=not sys.stderr.isatty() or not accelerator.is_main_process,
        )
        self.logging = contextlib.ExitStack()
        self.logging.enter_context(lines_above(self.bar))

    def init_trackers(self, settings: dict[str, Any]) -> None:
        """Start the tracker below logs/, without a network: wandb is offline unless WANDB_MODE is set."""
        os.environ.setdefault("WANDB_MODE", "offline")
        dvclive = {"dir": "logs/dvclive", "dvcyaml": None, "report": None, "save_dvc_exp": False}
        given = {name: value for name, value in settings.items() if value is not None}
        self.accelerator.init_trackers("lora-dag", given, {"wandb": {"dir": "logs"}, "dvclive": dvclive})

    def step(self, history: list[Row]) -> None:
        """Update bar, log and tracker after a step.

        Args:
            history: one row for each finished step.
        """
        done = len(history)
        loss, rate, norm = history[-1]
        self.accelerator.log({"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": norm}, step=done)
        self.bar.update()
        # Slow steps are logged once before ``every`` is reached.
        is_first = self.last_logged == self.started and time.monotonic() >= self.started + SECONDS
        if done % self.every and done != self.num_steps and not is_first:
            return
        self.last_logged = time.monotonic()
        images, smoothed = self.images_per_second(done), smoothed_loss(history)
        eta = duration((self.num_steps - done) * self.images_per_step / images)
        if self.bar.disable:
            line = "step %6d  loss %.4f  lr %.2e  grad_norm %7.4f  %6.1f images/s  ETA %s"
            log.info(line, done, smoothed, rate, norm, images, eta)
        else:
            self.bar.set_description_str(bar_text(smoothed, rate, norm, images, eta))

    def images_per_second(self, done: int) -> float:
        """Return the mean speed since the start of this process."""
        return (done - self.start) * self.images_per_step / max(time.monotonic() - self.started, 1e-9)

    def end(self, done: int) -> dict[str, float]:
        """Close bar and trackers after the last step; return speed and time for run.json."""
        self.bar.close()
        self.logging.close()
        self.accelerator.end_training()
        return {
            "images_per_second": round(self.images_per_second(done), 1),
            "resumed_from_step": self.start,
            "seconds": round(time.monotonic() - self.started, 1),
        }
