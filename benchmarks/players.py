"""Trainings in processes of their own that take turns: one runs a few steps while the others wait, in shuffled order.

Separate processes keep each side's threads, allocator, flags and compiled code its own; taking turns lets a busy
machine slow all of them alike, so that the ratios of one round hold what the seconds do not.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DROPPED = ("ACCELERATE_", "DVC_", "GIT_", "HF_", "LORA_", "MKL_", "OMP_", "PYTHON")


@dataclass(frozen=True)
class Variant:
    """How one side is started."""

    name: str
    command: tuple[str, ...]
    """A module or a script's path, and its arguments."""
    options: tuple[str, ...] = ()
    """Of benchmarks/child.py."""
    python: str = sys.executable


@dataclass(frozen=True)
class Turn:
    """What a few steps took."""

    wall: float
    cpu: float
    """Seconds of all threads."""
    parts: dict[str, float]
    peak_bytes: int
    """Of the GPU's memory, or of the process without one, since the start."""
    num_graphs: int
    """That torch.compile has made."""
    versions: dict[str, str]


class Failed(Exception):
    """A side ended before it was told to; the text is the end of what it said."""


class Player:
    """A side's process; its output goes to ``<folder>/<name>.log``."""

    def __init__(self, variant: Variant, folder: Path, warm_up: int) -> None:
        self.variant = variant
        self.log = folder / f"{variant.name.replace(' ', '-')}.log"
        here, there = socket.socketpair()
        options = ["--channel", str(there.fileno()), "--warm-up", str(warm_up), *variant.options]
        with there, self.log.open("w") as log:
            self.process = subprocess.Popen(
                [variant.python, "-m", "benchmarks.child", *options, "--", *variant.command],
                cwd=folder,
                env=environment(folder),
                stdout=log,
                stderr=log,
                pass_fds=[there.fileno()],
            )
        self.channel = here.makefile("rw")

    def go(self, num_steps: int) -> Turn:
        print(num_steps, file=self.channel, flush=True)
        return self.report()

    def report(self) -> Turn:
        """Wait for the end of the turn that runs.

        Raises:
            Failed: the process ended instead.
        """
        line = self.channel.readline()
        if not line:
            self.process.wait()
            raise Failed(f"{self.variant.name}:\n{tail(self.log)}")
        return Turn(**json.loads(line))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()


def environment(folder: Path) -> dict[str, str]:
    """One thread on a CPU, no network, caches below ``folder``, nothing of the surrounding run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    return kept | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "LORA_STATE_DIR": str(folder / ".state"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def in_turns(variants: list[Variant], folder: Path, warm_up: int, rounds: int, num_steps: int) -> dict[str, list[Turn]]:
    """Name -> a turn of ``num_steps`` for each round."""
    players: list[Player] = []
    expected: dict[str, str] = {}
    try:
        for variant in variants:  # one after another: all at once would contend for memory while they load
            players.append(Player(variant, folder, warm_up))
            versions = players[-1].report().versions
            if versions != (expected := expected or versions):
                raise Failed(f"{variant.name} runs with {versions}, {variants[0].name} with {expected}")
        order = random.Random(0)
        turns: dict[str, list[Turn]] = {variant.name: [] for variant in variants}
        for _ in range(rounds):
            for player in order.sample(players, len(players)):
                turns[player.variant.name].append(player.go(num_steps))
        return turns
    finally:
        for player in players:
            player.stop()


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def paired(reference: list[Turn], other: list[Turn], measure: str = "cpu") -> list[float]:
    """How many times as long the reference took, round by round."""
    return [getattr(a, measure) / getattr(b, measure) for a, b in zip(reference, other, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range, such as ``1.61 [1.54, 1.66]``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
