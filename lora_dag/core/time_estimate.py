"""Estimates of the time of a stage by its last run on this machine: <state>/took/<stage>-<key>.json.

No result depends on them, and no output contains them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dag.core.console import log
from lora_dag.core.files import from_json, sha256_json, state_dir, write_json

SHORT = 60  # seconds; shorter estimates are not logged


@dataclass(frozen=True)
class Work:
    """The work that a stage is about to do."""

    stage: str
    conditions: dict[str, Any]
    """Conditions of the speed, as JSON: base, dtype, processor, threads."""
    amount: float
    """Amount of work, in a unit that time is proportional to."""

    def announce(self, most: str = "", what: str = "") -> None:
        """Log the estimated time, if it is more than a minute.

        Args:
            most: "at most " if a part of the work may be done already.
            what: the work, such as " for 400 steps".
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):  # none, or damaged
            last = from_json(self._path.read_bytes())
            announce(float(last["seconds"]) / float(last["amount"]) * self.amount, most, what)

    def record(self, amount: float, seconds: float) -> None:
        """Store the seconds that an amount of work took."""
        if amount > 0:
            with contextlib.suppress(OSError):  # the stage has done its work without it
                write_json(self._path, {"amount": amount, "seconds": round(seconds, 3)})

    @property
    def _path(self) -> Path:
        return state_dir() / "took" / f"{self.stage}-{sha256_json(self.conditions)[:16]}.json"


def announce(seconds: float, most: str = "", what: str = "") -> None:
    if seconds > SHORT:
        log.info("time        %sabout %s%s, by the last run here", most, duration(seconds), what)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
