"""What every kind of entry needs, checked: the manifest, the base, the store, and the pictures as prepare saw them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.manifest import Item, Manifest, View, natural_key
from lora_dag.artifacts.store import Kind, Store
from lora_dag.bases import layout, resolve
from lora_dag.core.console import UserError, log
from lora_dag.core.device import environment, setup
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.protocol import load_family
from lora_dag.pictures.read import Read, reader
from stages.cache_latents import environments
from stages.cache_latents.encoding import NUM_READERS, Proofs, Tensors
from stages.cache_latents.keys import Setting
from stages.cache_latents.outdated import made_otherwise
from stages.cache_latents.params import CacheParams, flip_problems

if TYPE_CHECKING:
    import torch

    from lora_dag.families.protocol import Family

AGAIN = "run `python -m stages.prepare` again"


@dataclass(frozen=True)
class Context:
    """What every function below and every kind of entry is given."""

    manifest: Manifest
    read: Read
    family: Family
    model: ModelParams
    cache: CacheParams
    device: torch.device
    base: dict[str, str]
    """Digest per component of the base."""
    environment: dict[str, str | int]
    """What moves last bits: versions, processor, threads; see ``device.environment``."""
    store: Store
    outdated: str
    """What data/prepared was made with and the parameters have otherwise by now, in one line; empty for nothing."""

    def views(self, item: Item) -> tuple[View, ...]:
        """A held-out picture's first view alone: evidence looks at no other."""
        count = self.cache.num_variants if item.split == "train" else 1
        return self.manifest.augmentation.views(item, count)

    def captions(self, item: Item) -> tuple[str, ...]:
        """What can be asked for: of a held-out picture, the caption that evidence is measured with."""
        return item.captions if item.split == "train" else (item.caption,)

    def setting(self, kind: Kind) -> Setting:
        """As params.yaml asks for it."""
        pictures = kind == "latents"
        return Setting(
            components={name: self.base[name] for name in (self.family.VAE if pictures else self.family.TEXT)},
            family=self.model.family,
            dtype=self.family.vae_dtype(self.model) if pictures else self.model.dtype,
            device=self.device.type,
            batch_size=self.cache.batch_size,
            tiling=pictures and self.cache.tiling,
        )

    def speed(self, kind: Kind) -> dict[str, Any]:
        """What the time of an entry depends on: base, dtype, processor, threads."""
        setting, here = self.setting(kind), self.environment
        own = {"components": setting.components, "dtype": setting.dtype}
        return own | {"device": here["device"], "num_threads": here["num_threads"]}

    def proofs(self, kind: Kind, setting: Setting) -> Proofs:
        return Proofs(self.store.root / "proven.json", [kind, asdict(setting), self.environment])

    def save(self, kind: Kind, key: str, tensors: Tensors) -> None:
        self.store.save(kind, key, tensors, environments.made_by(kind, self.environment))


def make_context(config: Config, prepared: Path, *, reads_only: bool = False) -> Context:
    """Everything checked that can be checked before a model is loaded.

    Args:
        reads_only: make no base, and refuse no data/prepared that prepare would make otherwise.

    Raises:
        UserError: parameters, manifest, base, picture sizes or device.
    """
    asked, cache, runtime = config.section(ModelParams), config.section(CacheParams), config.section(RuntimeParams)
    manifest = Manifest.load(prepared)
    outdated = made_otherwise(manifest, prepared, config)
    family = load_family(asked.family)
    model = resolve.resolve(asked, family, make=not reads_only).model
    found = flip_problems(manifest.augmentation.flip, cache.num_variants)
    sizes = {(item.width, item.height) for item in manifest.items}
    found += layout.size_problems(model, family, sizes, asked.pretrained)
    if found and outdated and not reads_only:
        raise UserError(f"{outdated}; run `python -m stages.prepare` first")
    if found and not outdated:
        raise UserError(*found)
    warn_of_one_crop(manifest, cache)
    base = layout.digests(model, (*family.VAE, *family.TEXT))
    device = setup(runtime, model)
    return Context(
        manifest,
        reader(manifest.source),
        family,
        model,
        cache,
        device,
        base,
        environment(device),
        Store(),
        outdated,
    )


def warn_of_one_crop(manifest: Manifest, cache: CacheParams) -> None:
    if manifest.augmentation.crop == "random" and cache.num_variants == 1:
        log.warning(
            "warning: params.yaml dataset.crop: random with cache.num_variants 1 is one crop per picture for the whole "
            "training; set cache.num_variants to 2 or more"
        )
    if manifest.augmentation.crop == "center" and not manifest.augmentation.flip and cache.num_variants > 1:
        log.warning(
            "warning: params.yaml cache.num_variants: %d changes nothing without dataset.crop random or dataset.flip",
            cache.num_variants,
        )


class Changed(Exception):
    """A file is gone, or its bytes are not those that prepare checked."""


def mask_file(item: Item) -> tuple[str, str | None]:
    """Name and digest of the file that holds the mask: the picture's own, for alpha."""
    return (item.file_name, item.sha256) if item.mask == "alpha" else (str(item.mask), item.mask_sha256)


def read_checked(read: Read, name: str, digest: str | None) -> bytes:
    """The file's bytes.

    Raises:
        Changed: they are not those of the digest.
    """
    try:
        blob = read(name)
    except UserError:
        raise Changed(name) from None
    if digest not in (None, hashlib.sha256(blob).hexdigest()):
        raise Changed(name)
    return blob


def naming_changes(work: Callable[[], None], context: Context, items: Iterable[Item]) -> None:
    """Do the work; where it meets a changed file, look at those of all the items and name every one.

    Raises:
        UserError: one line per file.
    """
    try:
        work()
    except Changed as error:
        source = Path(context.manifest.source)
        raise UserError(
            *[
                f"{source}: {reason}" if reason else f"{source / name}: changed since prepare checked it; {AGAIN}"
                for name, reason in sorted(changes(context, items).items())
            ]
            or [f"{source / str(error)}: changed while it was read; {AGAIN}"]
        ) from None


def changes(context: Context, items: Iterable[Item]) -> dict[str, str | None]:
    """Pictures and masks that are not what prepare checked: name -> why it cannot be read, or None for other bytes."""
    files: dict[str, str | None] = {}
    for item in sorted(items, key=lambda item: natural_key(item.file_name)):
        files[item.file_name] = item.sha256
        if item.mask:
            files |= [mask_file(item)]

    def look(name: str) -> tuple[bool, str | None]:
        try:
            blob = context.read(name)
        except UserError as error:
            return False, error.problems[0]
        return files[name] in (None, hashlib.sha256(blob).hexdigest()), None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = zip(files, pool.map(look, files), strict=True)
        return {name: reason for name, (same, reason) in found if not same}
