"""Trainings that a test breaks off, and those that another program started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def broken_off(at: int) -> Iterator[None]:
    """A training inside breaks off in place of step ``at``; the test fails where it does not."""
    from stages.train.trainer import Trainer

    original = Trainer.step

    def step(self: Trainer, number: int) -> bool:
        if number == at:
            raise KeyboardInterrupt
        return original(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", step)
        yield


def process_with(variable: str) -> int:
    """Process id of the ``stages.train`` that has ``NAME=value`` in its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-m", b"stages.train"] and variable.encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process trains with {variable}")
