"""data/latents/: what cache_latents hands to train and validate.

manifest.json       items (file name, split, caption, content id, view keys), captions -> keys, digests (shards, base)
images/<p>.safetensors   per view key: ``<key>.mean`` and ``<key>.std``, float32 [C, H/f, W/f]
text/<p>.safetensors     per text key: one tensor per conditioning input, such as ``<key>.prompt_embeds`` [L, D]

Latents are in the denoiser's own space: shifted and scaled by the VAE's config. Shards are named by the first digits of
the keys they hold and depend on the set of items alone, so an edited picture rewrites few of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts.manifest import Split
from stages.core.console import UserError
from stages.core.files import load_tensors, read_json, save_tensors, sha256_file, understood, write_json

if TYPE_CHECKING:
    import torch

MANY = 4096  # above this many keys, shards go by two hex digits instead of one


@dataclass(frozen=True)
class CachedItem:
    file_name: str
    split: Split
    caption: str
    content: str
    """Names the first view by what it shows: the same under every VAE, dtype, device and batch size."""
    views: tuple[str, ...]
    """Key of each view; training draws one per step."""


class LatentCache:
    """The whole cache in memory, in float32: for SD 1.5, 10,000 views take 1.3 GB and as many captions 2.4 GB.

    Raises:
        UserError: a shard is missing or does not match its recorded digest.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; run `python -m stages.cache_latents` first")
        self.manifest: dict[str, Any] = read_json(path)
        with understood(path, "stages.cache_latents"):
            self.items = [CachedItem(**row | {"views": tuple(row["views"])}) for row in self.manifest["items"]]
            shards = dict(self.manifest["shards"])
        self.tensors: dict[str, torch.Tensor] = {}
        for name, digest in shards.items():
            shard = folder / name
            if not shard.exists() or sha256_file(shard) != digest:
                raise UserError(f"{shard}: missing or damaged; run `python -m stages.cache_latents` again")
            self.tensors |= load_tensors(shard)
        with understood(path, "stages.cache_latents"):
            for item in self.items:  # every entry that a stage can ask for is there
                self.prompt(item.caption), *map(self.latents, item.views)
            self.prompt("")

    @property
    def base(self) -> dict[str, str]:
        """Digest per component of the base that encoded this cache."""
        return self.manifest["base"]

    @property
    def digest(self) -> str:
        """Digest of everything in the cache."""
        from stages.core.files import sha256_json

        return sha256_json(self.manifest)

    def split(self, split: Split) -> list[CachedItem]:
        return [item for item in self.items if item.split == split]

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of one view's posterior, float32 [C, H/f, W/f] each."""
        return self.tensors[f"{key}.mean"].float(), self.tensors[f"{key}.std"].float()

    def prompt(self, caption: str) -> dict[str, torch.Tensor]:
        """Conditioning of one caption without a batch dimension, such as ``{"prompt_embeds": [L, D]}``."""
        key = self.manifest["captions"][caption]
        start = f"{key}."
        return {name.removeprefix(start): self.tensors[name] for name in self._names(key)}

    def _names(self, key: str) -> list[str]:
        return [f"{key}.{name}" for name in self.manifest["conditioning"]]


def write(
    folder: Path,
    items: Iterable[CachedItem],
    captions: dict[str, str],
    base: dict[str, str],
    conditioning: list[str],
    load: Callable[[str, str], dict[str, torch.Tensor]],
) -> None:
    """Assemble the cache from entries that ``load(kind, key)`` returns, kind being ``images`` or ``text``.

    Args:
        captions: caption -> key; holds the empty caption too.
        base: digest per component of the base.
        conditioning: sorted names of a text entry's tensors.
    """
    rows = sorted(items, key=lambda item: item.file_name)
    keys = {"images": {key for item in rows for key in item.views}, "text": set(captions.values())}
    digits = 1 if sum(map(len, keys.values())) <= MANY else 2
    shards: dict[str, str] = {}
    for kind, members in keys.items():
        by_prefix = defaultdict(list)
        for key in sorted(members):
            by_prefix[key[:digits]].append(key)
        for prefix, group in sorted(by_prefix.items()):
            name = f"{kind}/{prefix}.safetensors"
            entries = {key: load(kind, key) for key in group}
            tensors = {f"{key}.{part}": value for key, parts in entries.items() for part, value in parts.items()}
            save_tensors(folder / name, tensors)
            shards[name] = sha256_file(folder / name)
    write_json(
        folder / "manifest.json",
        {
            "base": base,
            "captions": captions,
            "conditioning": conditioning,
            "items": [asdict(item) for item in rows],
            "shards": shards,
        },
    )
