"""How far a stage is: one bar on a terminal, an aligned line every so often elsewhere; and a training's tracker."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lora_dag.core.console import log
from lora_dag.core.took import duration

SECONDS = 10  # between two lines of a bar where there is no terminal
SMOOTHING = 50  # steps that the shown loss is the mean of
T = TypeVar("T")
Row = tuple[float, float, float]  # loss, learning rate, gradient norm


class Bar:
    """Inside ``with``, counts what is done of a total; log lines of the meantime are written above the bar.

    Elsewhere than on a terminal, a line where SECONDS have passed since the last one: short work shows none.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Bar:
        self.bar = tqdm(total=self.total, desc=self.name, disable=not sys.stderr.isatty(), leave=False)
        self.logging = contextlib.ExitStack()
        self.logging.enter_context(lines_above(self.bar))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
        self.logging.close()

    def start(self) -> None:
        """Measure the speed from here: what was before was loading."""
        self.began = self.said = time.monotonic()
        self.bar.reset()

    def add(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and self.done and now >= self.said + SECONDS:
            self.said, rate = now, self.done / (now - self.began)
            left = duration((self.total - self.done) / rate)
            log.info("%-11s %7d of %d  %8.1f /s  ETA %s", self.name, self.done, self.total, rate, left)

    def skip(self, count: int) -> None:
        """What need not be done: no part of the total, nor of the speed."""
        self.total -= count
        self.bar.total = self.total
        self.bar.refresh()


def lines_above(bar: tqdm[Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, log lines are written above the bar, where both are on the terminal."""
    return contextlib.nullcontext() if bar.disable or not sys.stdout.isatty() else logging_redirect_tqdm()


def counted(name: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items; each counts as done when the next one is fetched."""
    with Bar(name, total) as bar:
        for item in items:
            yield item
            bar.add()


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
