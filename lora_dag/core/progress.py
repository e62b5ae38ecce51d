"""How far a stage is: one bar on a terminal, an aligned line every so often elsewhere."""

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
from lora_dag.core.took import duration

SECONDS = 10  # between two lines of a bar where there is no terminal
T = TypeVar("T")


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
