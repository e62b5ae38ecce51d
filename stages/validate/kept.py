"""What the base and adapters answered and drew before, so that another prompt, or another export, does not ask again.

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

from stages.artifacts import store
from stages.core.console import log
from stages.core.files import save_tensors, sha256_json, state_dir

if TYPE_CHECKING:
    import torch
    from PIL import Image

Tensors = dict[str, "torch.Tensor"]
MAX_BYTES = 2_000_000_000  # of each kind; the least recently used goes. 8 pictures of 512 x 512 take 6.3 MB


@dataclass(frozen=True)
class Kept:
    """Results under some conditions."""

    conditions: dict[str, Any]
    """Base, family, dtype, code and environment: what moves last bits is part of the key, as in train's run digest."""
    reused: Counter[str] = field(default_factory=Counter)
    """Kind -> number of those that were found."""

    def under(self, **conditions: Any) -> Kept:
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
        """The same of RGB pictures of one size: a sheet."""
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
            os.utime(path)
            self.reused[kind] += 1
            return found.tensors
        if path.exists():
            log.warning("warning: %s is damaged and is made again", path)
        tensors = make()
        save_tensors(path, tensors, {"entry": entry, "sha256": store.checksum(tensors, "", entry)}, sync=False)
        drop_oldest(path.parent)
        return tensors

    def log_reused(self) -> None:
        if self.reused:
            log.info(
                "reused      %d losses and %d sheets, from %s", self.reused["losses"], self.reused["pictures"], root()
            )


def root() -> Path:
    return state_dir() / "evidence"


def drop_oldest(folder: Path) -> None:
    """All but the MAX_BYTES that were used last; another process may do the same."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat()
    kept = 0
    for path in sorted(found, key=lambda path: found[path].st_mtime, reverse=True):
        kept += found[path].st_size
        if kept > MAX_BYTES:
            path.unlink(missing_ok=True)
