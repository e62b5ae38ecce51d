"""Training checkpoints in the state directory: written atomically, verified on load, the last two kept."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch

from lora_dag.core.console import warn
from lora_dag.core.files import atomic, sha256_file, write_text

KEEP = 2
FORMAT = 2
"""Version of the state's fields. Raise it when they change, since edited code resumes from older checkpoints."""


class Checkpoints:
    """Files ``<folder>/step-000050.pt`` with a sha256 file beside each; tensors and plain values, no pickled code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` optimizer steps, then delete all checkpoints up to it except the last KEEP.

        Checkpoints of later steps belong to a longer run of the same inputs and stay.
        """
        path = self.folder / f"step-{step:06d}.pt"
        blob = io.BytesIO()  # torch.save would hide the reason of a disk error
        torch.save(state | {"step": step}, blob)
        with atomic(path) as temporary:
            temporary.write_bytes(blob.getbuffer())
        write_text(path.with_suffix(".sha256"), sha256_file(path))
        for old in self.paths(step)[:-KEEP]:
            old.with_suffix(".sha256").unlink(missing_ok=True)
            old.unlink()

    def load(self, last: int) -> dict[str, Any] | None:
        """Return the newest undamaged state up to step ``last``, or None. Damaged files cause a warning."""
        paths = self.paths(last)
        for path in reversed(paths):
            checksum = path.with_suffix(".sha256")
            if checksum.exists() and checksum.read_bytes() == sha256_file(path).encode():
                return torch.load(path, weights_only=True, map_location="cpu")
            then = "The run starts from step 0." if path == paths[0] else "The checkpoint before it is used."
            warn("checkpoint-damaged", f"{path} is damaged or incomplete. {then}")
        return None

    def describe_newest(self) -> str:
        """Describe the newest checkpoint in words, for the message after Ctrl-C."""
        step = self.newest_step
        return f"the checkpoint after step {step} is kept" if step else "no checkpoint was written yet"

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max((int(path.stem[5:]) for path in self.paths(sys.maxsize)), default=0)

    def paths(self, last: int) -> list[Path]:
        """Return the checkpoints up to step ``last`` in order."""
        steps = {int(path.stem[5:]): path for path in self.folder.glob("step-*.pt") if path.stem[5:].isdecimal()}
        return [path for step, path in sorted(steps.items()) if step <= last]
