"""What the base answered and drew before, so that another rank, or another prompt, does not ask it again.

<state>/evidence/<kind>/<key>.safetensors   kind: ``losses`` or ``pictures``; the key holds all that decides them
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.artifacts import store
from stages.core.console import log
from stages.core.files import save_tensors, sha256_json, state_dir

if TYPE_CHECKING:
    import torch
    from PIL import Image

Tensors = dict[str, "torch.Tensor"]
MAX_KEPT = 64  # of each kind; the least recently used goes. 8 prompts and 4 seeds at 512 x 512 take 25 MB


@dataclass(frozen=True)
class Kept:
    """Results of the base under some conditions."""

    conditions: dict[str, Any]
    """Base, family, dtype, code and environment: what moves last bits is part of the key, as in train's run digest."""
    reused: list[str] = field(default_factory=list)
    """What was found."""

    def losses(self, what: str, asked: Any, make: Callable[[], list[float]]) -> list[float]:
        """What ``make`` returns, or returned when it was asked the same.

        Args:
            what: for the log.
            asked: all that decides the result beside the conditions, as JSON.
        """
        import torch

        tensors = self._get("losses", what, asked, lambda: {"losses": torch.tensor(make(), dtype=torch.float64)})
        return tensors["losses"].tolist()

    def pictures(self, what: str, asked: Any, make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
        """The same of RGB pictures of one size."""
        import numpy as np
        import torch
        from PIL import Image

        def draw() -> Tensors:
            return {"pictures": torch.from_numpy(np.stack([np.asarray(drawn.convert("RGB")) for drawn in make()]))}

        tensors = self._get("pictures", what, asked, draw)  # uint8 [N, H, W, 3]
        return [Image.fromarray(array) for array in tensors["pictures"].numpy()]

    def _get(self, kind: Literal["losses", "pictures"], what: str, asked: Any, make: Callable[[], Tensors]) -> Tensors:
        key = sha256_json([self.conditions, asked])
        path, entry = root() / kind / f"{key}.safetensors", f"{kind}/{key}"
        found = store.read(path, entry)
        if found is not None:
            os.utime(path)
            self.reused.append(what)
            return found.tensors
        if path.exists():
            log.warning("warning: %s is damaged and is made again", path)
        tensors = make()
        save_tensors(path, tensors, {"entry": entry, "sha256": store.checksum(tensors, "", entry)}, sync=False)
        drop_oldest(path.parent)
        return tensors

    def log_reused(self) -> None:
        if self.reused:
            log.info("reused      from %s: %s", root(), ", ".join(self.reused))


def root() -> Path:
    return state_dir() / "evidence"


def drop_oldest(folder: Path) -> None:
    """All but the MAX_KEPT that were used last; another process may do the same."""
    used = {}
    for path in folder.glob("*.safetensors"):
        try:
            used[path] = path.stat().st_mtime
        except FileNotFoundError:
            continue
    for path in sorted(used, key=lambda path: used[path])[:-MAX_KEPT]:
        path.unlink(missing_ok=True)
