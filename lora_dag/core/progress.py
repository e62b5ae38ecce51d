"""Progress of a stage: a bar on a terminal, an aligned log line every SECONDS elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lora_dag.core.console import log
from lora_dag.core.time_estimate import duration

if TYPE_CHECKING:
    import torch

MB = 10**6
SECONDS = 10  # between two lines of a bar where there is no terminal
SLOW = 0.1  # items per second; below, the seconds of an item are shown
T = TypeVar("T")


class Bar:
    """Context manager that counts finished items of a total; log lines appear above the bar.

    In a pipe or file it logs a line every SECONDS, so short work logs none.

    Args:
        unit: unit of the items, such as MB; empty for a plain count.
    """

    def __init__(self, name: str, total: int, unit: str = "") -> None:
        self.name, self.total, self.done, self.unit = name, total, 0, unit
        self.began = self.logged = time.monotonic()

    def __enter__(self) -> Self:
        shown = {"desc": self.name, "unit": self.unit or "it", "disable": not sys.stderr.isatty(), "leave": False}
        self.bar = tqdm(total=self.total, **shown)
        self.logging = contextlib.ExitStack()
        self.logging.enter_context(lines_above(self.bar))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
        self.logging.close()

    def start(self) -> None:
        """Measure the speed from now on: before was loading."""
        self.began = self.logged = time.monotonic()
        self.bar.reset()

    def add(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and self.done and now >= self.logged + SECONDS:
            self.logged, rate = now, self.done / (now - self.began)
            left, unit = duration((self.total - self.done) / rate), f" {self.unit}"
            speed = f"{rate:8.1f}{unit}/s" if rate >= SLOW else f"{1 / rate:8.1f} s each"
            total = f"{self.total}{unit.rstrip()}"
            log.info("%-11s %7d of %s  %s  ETA %s", self.name, self.done, total, speed, left)

    def skip(self, count: int) -> None:
        """Remove items that need no work from the total; they do not count for the speed."""
        self.total -= count
        self.bar.total = self.total
        self.bar.refresh()


def lines_above(bar: tqdm[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which log lines are written above the bar, if both are on the terminal."""
    return contextlib.nullcontext() if bar.disable or not sys.stdout.isatty() else logging_redirect_tqdm()


class ByteBar(Bar):
    """Bar that counts bytes and shows MB."""

    def __init__(self, name: str, num_bytes: int) -> None:
        super().__init__(name, num_bytes // MB, "MB")
        self.num_bytes = 0

    def add_bytes(self, count: int) -> None:
        self.num_bytes += count
        self.add(self.num_bytes // MB - self.done)


@contextlib.contextmanager
def elapsed(name: str, text: str, every: float = SECONDS) -> Iterator[None]:
    """Log a line at each interval while work without a count runs, such as loading a model.

    Args:
        every: the interval, in seconds.
    """
    began, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(every):
            log.info("%-11s %s: %s so far", name, text, duration(time.monotonic() - began))

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show_elapsed(module: torch.nn.Module, name: str, text: str, every: float = SECONDS) -> None:
    """Log a line at each interval while a call of the module runs, for calls that may take minutes on a CPU."""
    running = contextlib.ExitStack()
    module.register_forward_pre_hook(lambda *_: running.enter_context(elapsed(name, text, every)))
    module.register_forward_hook(lambda *_: running.close(), always_call=True)


def counted(name: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items; each counts as done when the next one is fetched."""
    with Bar(name, total) as bar:
        for item in items:
            yield item
            bar.add()
