"""Progress of a stage: a bar on a terminal, an aligned log line every SECONDS elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lora_dag.core.console import log
from lora_dag.core.time_estimate import duration

SECONDS = 10  # between two lines of a bar where there is no terminal
T = TypeVar("T")


class Bar:
    """Context manager that counts finished items of a total; log lines appear above the bar.

    In a pipe or file it logs a line every SECONDS, so short work logs none.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.began = self.logged = time.monotonic()

    def __enter__(self) -> Bar:
        self.bar = tqdm(total=self.total, desc=self.name, disable=not sys.stderr.isatty(), leave=False)
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
            left = duration((self.total - self.done) / rate)
            log.info("%-11s %7d of %d  %8.1f /s  ETA %s", self.name, self.done, self.total, rate, left)

    def skip(self, count: int) -> None:
        """Remove items that need no work from the total; they do not count for the speed."""
        self.total -= count
        self.bar.total = self.total
        self.bar.refresh()


def lines_above(bar: tqdm[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which log lines are written above the bar, if both are on the terminal."""
    return contextlib.nullcontext() if bar.disable or not sys.stdout.isatty() else logging_redirect_tqdm()


def counted(name: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items; each counts as done when the next one is fetched."""
    with Bar(name, total) as bar:
        for item in items:
            yield item
            bar.add()
