"""Cache of losses and samples of earlier runs, so that none is computed twice.

<state>/evidence/<kind>/<key>.safetensors   kind: ``losses`` or ``images``; key: digest of everything that determines
                                            the result
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
from lora_dag.core.console import log, plural, warn
from lora_dag.core.files import sha256_json, state_dir
from lora_dag.core.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from PIL import Image

Tensors = dict[str, "torch.Tensor"]
MAX_BYTES, MAX_FILES = 2_000_000_000, 4000
"""Limits per kind; the least recently used files are deleted. Eight images of 512 x 512 take 6.3 MB."""


@dataclass(frozen=True)
class ResultCache:
    """Results under fixed conditions."""

    conditions: dict[str, Any]
    """Base, family, dtype, code and environment. Everything that changes the last bits is part of the key."""
    reused: Counter[str] = field(default_factory=Counter)
    """Kind -> number of cache hits."""

    def with_conditions(self, **conditions: Any) -> ResultCache:
        """Return this cache with further conditions."""
        return replace(self, conditions=self.conditions | conditions)

    def losses(self, request: Any, make: Callable[[], list[float]]) -> list[float]:
        """Return the cached result of ``make`` for this request; call ``make`` if there is none.

        Args:
            request: everything that determines the result besides the conditions, as JSON.
        """
        import torch

        tensors = self._get("losses", request, lambda: {"losses": torch.tensor(make(), dtype=torch.float64)})
        return tensors["losses"].tolist()

    def images(self, request: Any, make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
        """Return the cached RGB images, all of one size, for this request; call ``make`` if there are none."""
        import numpy as np
        import torch
        from PIL import Image

        def draw() -> Tensors:
            return {"images": torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in make()]))}

        tensors = self._get("images", request, draw)  # uint8 [N, H, W, 3]
        return [Image.fromarray(array) for array in tensors["images"].numpy()]

    def _get(self, kind: Literal["losses", "images"], request: Any, make: Callable[[], Tensors]) -> Tensors:
        key = sha256_json([self.conditions, request])
        path, entry = cache_root() / kind / f"{key}.safetensors", f"{kind}/{key}"
        cached = store.read_entry(path, entry)
        if cached is not None:
            with contextlib.suppress(OSError):  # another process may have deleted it
                os.utime(path)
            self.reused[kind] += 1
            return cached.tensors
        if path.exists():
            warn("cached-result-damaged", f"{path} is damaged. It is computed again.")
        tensors = make()
        save_tensors(path, tensors, {"entry": entry, "sha256": store.checksum(tensors, "", entry)}, sync=False)
        return tensors

    def log_and_trim(self) -> None:
        """Log the cache hits, and delete the least recently used files above the limits."""
        if self.reused:
            num_losses, num_images = self.reused["losses"], self.reused["images"]
            counts = plural(num_losses, "table"), plural(num_images, "row")
            log.info("reused      %s of losses, %s of images, from %s", *counts, cache_root())
        for folder in cache_root().glob("*"):
            drop_oldest(folder)


def cache_root() -> Path:
    """Return the folder of all cached results."""
    return state_dir() / "evidence"


def drop_oldest(folder: Path) -> None:
    """Delete the least recently used files above the limits. Another process may do so at the same time."""
    stats = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            stats[path] = path.stat()
    size = 0
    for index, path in enumerate(sorted(stats, key=lambda path: stats[path].st_mtime, reverse=True)):
        size += stats[path].st_size
        if size > MAX_BYTES or index >= MAX_FILES:
            path.unlink(missing_ok=True)
