"""data/latents/: the output of cache_latents, the input of train and validate.

manifest.json       items (file name, split, captions, content id, keys), captions -> keys, digests (shards, base)
images/<p>.safetensors   per view key: ``<key>.mean`` and ``<key>.std``, float32 [C, H/f, W/f]; conditioning by the
                         view for some models, such as ``<key>.add_time_ids`` [6]
masks/<p>.safetensors    per mask key: ``<key>.mask``, float32 [1, H/f, W/f]
text/<p>.safetensors     per text key: one tensor per conditioning input, such as ``<key>.prompt_embeds`` [L, D], and
                         its full shape if zeros at its end are left out; see packing.py

Latents are in the denoiser's space: shifted and scaled by the VAE's config. An entry is in the shard of its owner, the
first image by file name that uses it. Shards are named by the digest of their owners' names: an edited image rewrites
one shard of images, an edited caption one shard of text (two, if the owner changes). Datasets of more than 2048 images
have 256 shards of each kind instead of 16: image 2049 rewrites all shards once.

Every entry is on the disk twice, in the store and here. A caption of SD 1.5 takes 237 KB in float32, and a view of
512 x 512 pixels 131 KB: 10,000 images with one caption and one view take 3.7 GB here, with eight caption variants each
20 GB. In bfloat16 or float16 a caption takes half, except for SD 1.5 on a GPU: autocast runs its last norm in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from lora_dag.artifacts import packing
from lora_dag.artifacts.manifest import Split
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import artifact_errors, from_json, sha256_file, sha256_json, write_json
from lora_dag.core.tensors import MappedTensors, save_tensors

if TYPE_CHECKING:
    import torch

MANY = 2048  # above this many images, shards go by two hex digits of their owners' digests instead of one
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^(images|masks|text)/[0-9a-f]{1,2}\.safetensors$")]


@dataclass(frozen=True)
class CachedItem:
    __pydantic_config__ = ConfigDict(extra="forbid")
    file_name: str
    split: Split
    caption: str
    """The caption that validate uses."""
    captions: Annotated[tuple[str, ...], Field(min_length=1)]
    """Captions that training draws from, one per step."""
    content: str
    """Content id of the first view and its mask, independent of VAE, dtype, device and batch size."""
    views: Annotated[tuple[str, ...], Field(min_length=1)]
    """Key of each view; training draws one per step."""
    masks: tuple[str, ...] = ()
    """Key of each view's mask; empty without masks."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Number of uses per epoch."""
    loss_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    regularization: bool = False
    """Whether the image is used in training only, not in validate."""


@dataclass(frozen=True)
class Contents:
    """Content of manifest.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    base: dict[str, str]
    captions: dict[str, str]
    conditioning: Annotated[list[str], Field(min_length=1)]
    items: Annotated[list[CachedItem], Field(min_length=1)]
    shards: dict[ShardName, Digest]
    text_form: Literal[1, 2] = 1
    """Form of the embeddings. A version that does not know a form refuses the manifest."""
    view_conditioning: tuple[str, ...] = ()


CONTENTS = TypeAdapter(Contents)


class LatentCache:
    """The whole cache, mapped into memory. Callers must not change its tensors.

    The memory of the process grows with the tensors that callers keep, not with the cache, except for an index.

    Raises:
        UserError: a shard is missing or does not match its recorded digest.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.exists():
            text = f"{path}: no such file. Run `python -m stages.cache_latents` first."
            raise UserError(Problem("artifact-missing", text))
        with artifact_errors(path, "stages.cache_latents"):
            text = path.read_text(encoding="utf-8")
            contents = CONTENTS.validate_json(text, strict=True)
            self.manifest: dict[str, Any] = from_json(text)
        self.items = contents.items
        self.tensors = MappedTensors()
        for name, digest in contents.shards.items():
            add_shard(self.tensors, folder / name, digest)
        with artifact_errors(path, "stages.cache_latents"):
            for item in self.items:  # check all entries that stages use
                self._require(item)
            self.prompt("")

    @property
    def base(self) -> dict[str, str]:
        """Component -> digest of the base model that encoded this cache."""
        return self.manifest["base"]

    @property
    def digest(self) -> str:
        """Digest of the whole cache."""
        return sha256_json(self.manifest)

    def split(self, split: Split) -> list[CachedItem]:
        return [item for item in self.items if item.split == split]

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of one view's posterior, float32 [C, H/f, W/f] each."""
        return self.tensors[f"{key}.mean"].float(), self.tensors[f"{key}.std"].float()

    def size(self, key: str) -> tuple[int, int]:
        """Return height and width of one view's latents."""
        height, width = self.tensors[f"{key}.mean"].shape[-2:]
        return height, width

    def mask(self, key: str) -> torch.Tensor:
        """Return the weight of each latent pixel's loss, float32 [1, H/f, W/f], from dataset.unmasked_weight to 1."""
        return self.tensors[f"{key}.mask"].float()

    def prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        """Return conditioning without a batch dimension, such as ``{"prompt_embeds": [L, D]}``, in float32.

        Args:
            view: key of the view, for conditioning by the view.
        """
        return {name: tensor.float() for name, tensor in self.stored_prompt(caption, view).items()}

    def stored_prompt(self, caption: str, view: str | None = None) -> dict[str, torch.Tensor]:
        """Return the same values in the dtypes of the files, which take less memory."""
        key = self.manifest["captions"][caption]
        found = {
            name: packing.unpack(self.tensors[f"{key}.{name}"], self.tensors.get(f"{key}.{name}{packing.SHAPE}"))
            for name in self.manifest["conditioning"]
        }
        return found | ({} if view is None else {name: self.tensors[f"{view}.{name}"] for name in self.by_view})

    @property
    def by_view(self) -> list[str]:
        """Names of the conditioning inputs that depend on the view."""
        return self.manifest.get("view_conditioning", [])

    def _require(self, item: CachedItem) -> None:
        names = [f"{key}.{part}" for key in item.views for part in ("mean", "std", *self.by_view)]
        names += [f"{key}.mask" for key in item.masks]
        for caption in (item.caption, *item.captions):
            key = self.manifest["captions"][caption]
            names += [f"{key}.{name}" for name in self.manifest["conditioning"]]
        missing = [name for name in names if name not in self.tensors]
        if missing or len(item.masks) not in (0, len(item.views)):
            raise KeyError(missing[0] if missing else f"views of {item.file_name}")


def add_shard(tensors: MappedTensors, path: Path, digest: str) -> None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        if tensors.add(path) == digest:
            return
    text = f"{path}: missing or damaged. Run `python -m stages.cache_latents` again."
    raise UserError(Problem("artifact-damaged", text))


def write(
    folder: Path,
    items: Iterable[CachedItem],
    captions: dict[str, str],
    base: dict[str, str],
    conditioning: list[str],
    load: Callable[[str, str], dict[str, torch.Tensor]],
    view_conditioning: Sequence[str] = (),
    text_form: int = packing.FLOAT32,
) -> None:
    """Write the cache from entries that ``load(kind, key)`` returns, where kind is ``images``, ``masks`` or ``text``.

    Args:
        captions: caption -> key, including the empty caption.
        base: component -> digest of the base model.
        conditioning: sorted names of a caption's embeddings.
        view_conditioning: sorted names of a view's tensors beside mean and std.
        text_form: form of the embeddings.
    """
    rows = sorted(items, key=lambda item: item.file_name)
    digits = 1 if len(rows) <= MANY else 2
    shards: dict[str, str] = {}
    for kind, owner in owners(rows, captions).items():
        by_shard = defaultdict(list)
        for key in sorted(owner):
            by_shard[hashlib.sha256(owner[key].encode()).hexdigest()[:digits]].append(key)
        for prefix, keys in sorted(by_shard.items()):
            name = f"{kind}/{prefix}.safetensors"
            tensors = {f"{key}.{part}": value for key in keys for part, value in load(kind, key).items()}
            save_tensors(folder / name, tensors, sync=False)  # its digest is in the manifest
            shards[name] = sha256_file(folder / name)
    manifest = contents(rows, captions, base, conditioning, view_conditioning, text_form)
    write_json(folder / "manifest.json", manifest | {"shards": shards})


def contents(
    rows: list[CachedItem],
    captions: dict[str, str],
    base: dict[str, str],
    conditioning: list[str],
    view_conditioning: Sequence[str],
    text_form: int,
) -> dict[str, Any]:
    """Return the manifest without digests of shards, for rows sorted by file name."""
    fields: dict[str, Any] = {"base": base, "captions": captions, "conditioning": conditioning}
    fields |= {"items": [asdict(row) for row in rows]}
    fields |= {} if text_form == packing.FLOAT32 else {"text_form": text_form}
    return fields | ({"view_conditioning": list(view_conditioning)} if view_conditioning else {})


def owners(rows: list[CachedItem], captions: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return kind -> key -> file name of the first row that uses it; the empty caption has the empty owner."""
    owner: dict[str, dict[str, str]] = {"images": {}, "masks": {}, "text": {captions[""]: ""}}
    for row in rows:
        for kind, keys in (
            ("images", row.views),
            ("masks", row.masks),
            ("text", (captions[caption] for caption in (row.caption, *row.captions))),
        ):
            for key in keys:
                owner[kind].setdefault(key, row.file_name)
    return owner
