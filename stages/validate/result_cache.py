"""What the base and adapters answered and drew before, so that nothing of it is asked twice.

<state>/evidence/<kind>/<key>.safetensors   kind: ``losses`` or ``pictures``; the key holds all that decides them
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_dag.artifacts import store
from lora_dag.core.console import log, plural
from lora_dag.core.files import sha256_json, state_dir
from lora_dag.core.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from PIL import Image

Tensors = dict[str, "torch.Tensor"]
MAX_BYTES, MAX_FILES = 2_000_000_000, 4000
"""Of each kind; the least recently used goes. Eight pictures of 512 x 512 take 6.3 MB."""


@dataclass(frozen=True)
class ResultCache:
    """Results under some conditions."""

    conditions: dict[str, Any]
    """Base, family, dtype, code and environment: what moves last bits is part of the key."""
    reused: Counter[str] = field(default_factory=Counter)
    """Kind -> number of those that were found."""

    def under(self, **conditions: Any) -> ResultCache:
        """The same with further conditions."""
        return replace(self, conditions=self.conditions | conditions)

    def losses(self, asked: Any, make: Callable[[], list[float]]) -> list[float]:
        """What ``make`` returns, or returned when it was asked the same.

        Args:
            asked: all that decides the result beside the conditions, as JSON.
        """
        import torch

        tensors = self._get("losses", asked, lambda: {"losses": torch.tensor(make(), dtype=torch.float64)})
        return tensors["losses"].tolist()

    def pictures(self, asked: Any, make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
        """The same of RGB pictures of one size."""
        import numpy as np
        import torch
        from PIL import Image

        def draw() -> Tensors:
            return {"pictures": torch.from_numpy(np.stack([np.asarray(drawn.convert("RGB")) for drawn in make()]))}

        tensors = self._get("pictures", asked, draw)  # uint8 [N, H, W, 3]
        return [Image.fromarray(array) for array in tensors["pictures"].numpy()]

    def _get(self, kind: Literal["losses", "pictures"], asked: Any, make: Callable[[], Tensors]) -> Tensors:
        key = sha256_json([self.conditions, asked])
        path, entry = root() / kind / f"{key}.safetensors", f"{kind}/{key}"
        found = store.read(path, entry)
        if found is not None:
            with contextlib.suppress(OSError):  # another process may just have dropped it
                os.utime(path)
            self.reused[kind] += 1
            return found.tensors
        if path.exists():
            log.warning("warning: %s is damaged and is made again", path)
        tensors = make()
        save_tensors(path, tensors, {"entry": entry, "sha256": store.checksum(tensors, "", entry)}, sync=False)
        return tensors

    def end(self) -> None:
        """Say what was found, and make room."""
        if self.reused:
            num_losses, num_pictures = self.reused["losses"], self.reused["pictures"]
            kept = plural(num_losses, "table"), plural(num_pictures, "row")
            log.info("reused      %s of losses, %s of pictures, from %s", *kept, root())
        for folder in root().glob("*"):
            drop_oldest(folder)


def root() -> Path:
    return state_dir() / "evidence"


def drop_oldest(folder: Path) -> None:
    """All but those that were used last; another process may do the same."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat()
    size = 0
    for index, path in enumerate(sorted(found, key=lambda path: found[path].st_mtime, reverse=True)):
        size += found[path].st_size
        if size > MAX_BYTES or index >= MAX_FILES:
            path.unlink(missing_ok=True)
