"""Training checkpoints in the state directory: whole, checked on load, the previous one kept."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch

from lora_dag.core.console import log
from lora_dag.core.files import atomic, sha256_file, write_text

KEEP = 2
FORMAT = 2
"""Of a state's fields. Raise it with every change of theirs: code that is edited goes on from older checkpoints."""


class Checkpoints:
    """``<folder>/step-000050.pt`` with its sha256 beside it; tensors and plain values only, never pickled code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state reached after ``step`` optimizer steps, then drop all but KEEP up to it.

        Later ones are of a longer run of the same inputs.
        """
        path = self.folder / f"step-{step:06d}.pt"
        blob = io.BytesIO()  # torch.save itself hides why a disk refuses
        torch.save(state | {"step": step}, blob)
        with atomic(path) as temporary:
            temporary.write_bytes(blob.getbuffer())
        write_text(path.with_suffix(".sha256"), sha256_file(path))
        for old in self.paths(step)[:-KEEP]:
            old.with_suffix(".sha256").unlink(missing_ok=True)
            old.unlink()

    def load(self, last: int) -> dict[str, Any] | None:
        """The newest state up to step ``last`` whose checksum holds, or None; warns of damaged ones."""
        for path in reversed(self.paths(last)):
            checksum = path.with_suffix(".sha256")
            if checksum.exists() and checksum.read_bytes() == sha256_file(path).encode():
                return torch.load(path, weights_only=True, map_location="cpu")
            log.warning("warning: %s is damaged or unfinished; trying the checkpoint before it", path)
        return None

    def newest(self) -> str:
        """In words, for a person who breaks off."""
        step = self.newest_step
        return f"the checkpoint after step {step} is kept" if step else "no checkpoint was due yet"

    @property
    def newest_step(self) -> int:
        """0 where there is none."""
        return max((int(path.stem[5:]) for path in self.paths(sys.maxsize)), default=0)

    def paths(self, last: int) -> list[Path]:
        """In the order of their steps, up to ``last``."""
        steps = {int(path.stem[5:]): path for path in self.folder.glob("step-*.pt") if path.stem[5:].isdecimal()}
        return [path for step, path in sorted(steps.items()) if step <= last]
