"""Run trainings in processes of their own that take turns: one runs a few steps while the others wait, in shuffled
order.

In separate processes, threads, allocator, flags and compiled code of the sides do not mix. A busy machine slows all
sides of a round alike, so the ratios within a round are comparable although the seconds are not.
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
    """Command and environment of one side."""

    name: str
    command: tuple[str, ...]
    """A module or a script's path, and its arguments."""
    options: tuple[str, ...] = ()
    """Arguments of benchmarks/child.py."""
    python: str = sys.executable


@dataclass(frozen=True)
class Turn:
    """Time of a few steps."""

    wall: float
    cpu: float
    """Seconds of all threads."""
    parts: dict[str, float]
    peak_bytes: int
    """Peak of the GPU's memory since the start; without a GPU, of the process's memory."""
    num_graphs: int
    """Graphs that torch.compile has made."""
    versions: dict[str, str]


class Failed(Exception):
    """A side ended too early. The text is the end of its output."""


class Player:
    """Process of a side. Its output goes to ``<folder>/<name>.log``."""

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
        """Wait for the end of the current turn.

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
    """Return the environment of a side: one thread on a CPU, no network, caches in ``folder``, nothing of the
    surrounding run.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    return kept | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "LORA_STATE_DIR": str(folder / ".state"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def in_turns(variants: list[Variant], folder: Path, warm_up: int, rounds: int, num_steps: int) -> dict[str, list[Turn]]:
    """Return name -> a turn of ``num_steps`` for each round."""
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
    """Return the time of the reference divided by the time of a side, round by round."""
    return [getattr(a, measure) / getattr(b, measure) for a, b in zip(reference, other, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Return median and range, such as ``1.61 [1.54, 1.66]``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
