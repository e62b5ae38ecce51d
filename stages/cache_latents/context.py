"""Checked inputs of all encoders: manifest, base model, store, and images with the bytes that prepare checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.manifest import Item, Manifest, View, natural_key
from lora_dag.artifacts.store import Kind, Store
from lora_dag.bases import component_files, image_sizes, resolve
from lora_dag.core.console import Problem, UserError, warn
from lora_dag.core.device import environment, setup
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.protocol import load_family
from lora_dag.images.read import ReadImage, image_reader
from stages.cache_latents import environments
from stages.cache_latents.encoding import NUM_READERS, Tensors, VerifiedBatchShapes
from stages.cache_latents.keys import Setting
from stages.cache_latents.params import CacheParams, flip_problems
from stages.cache_latents.prepared_settings import describe_outdated_settings

if TYPE_CHECKING:
    import torch

    from lora_dag.families.protocol import Family

RUN_PREPARE = "Run `python -m stages.prepare` again."


@dataclass(frozen=True)
class Context:
    """Inputs of the stage, checked."""

    manifest: Manifest
    read: ReadImage
    family: Family
    model: ModelParams
    cache: CacheParams
    device: torch.device
    base: dict[str, str]
    """Component of the base model -> sha256 of its files."""
    environment: dict[str, str | int]
    """Versions, processor and threads, which can change last bits; see ``device.environment``."""
    store: Store
    outdated: str
    """Settings of data/prepared that params.yaml has changed since, in one line; empty for none."""

    def views(self, item: Item) -> tuple[View, ...]:
        """Return the views to encode: all of a training image, only the first of a held-out image."""
        count = self.cache.num_variants if item.split == "train" else 1
        return self.manifest.augmentation.views(item, count)

    def captions(self, item: Item) -> tuple[str, ...]:
        """Return the captions to encode: all of a training image, the evaluation's caption of a held-out image."""
        return item.captions if item.split == "train" else (item.caption,)

    def requested_setting(self, kind: Kind) -> Setting:
        """Return the encoding setting of params.yaml."""
        images = kind == "latents"
        return Setting(
            components={name: self.base[name] for name in (self.family.VAE if images else self.family.TEXT)},
            family=self.model.family,
            dtype=self.family.vae_dtype(self.model) if images else self.model.dtype,
            device=self.device.type,
            batch_size=self.cache.batch_size,
            tiling=images and self.cache.tiling,
        )

    def speed_conditions(self, kind: Kind) -> dict[str, Any]:
        """Return the facts that the time to encode an entry depends on: base model, dtype, processor, threads."""
        setting, here = self.requested_setting(kind), self.environment
        own = {"components": setting.components, "dtype": setting.dtype}
        return own | {"device": here["device"], "num_threads": here["num_threads"]}

    def verified_shapes(self, kind: Kind, setting: Setting) -> VerifiedBatchShapes:
        return VerifiedBatchShapes(self.store.root / "proven.json", [kind, asdict(setting), self.environment])

    def save(self, kind: Kind, key: str, tensors: Tensors) -> None:
        self.store.save(kind, key, tensors, environments.environment_json(kind, self.environment))


def make_context(config: Config, prepared: Path, *, reads_only: bool = False) -> Context:
    """Check all inputs that can be checked before a model is loaded.

    Args:
        reads_only: download and convert no base model, and accept an outdated data/prepared.

    Raises:
        UserError: a problem in parameters, manifest, base model, image sizes or device.
    """
    requested, cache, runtime = config.section(ModelParams), config.section(CacheParams), config.section(RuntimeParams)
    manifest = Manifest.load(prepared)
    outdated = describe_outdated_settings(manifest, prepared, config)
    family = load_family(requested.family)
    model = resolve.resolve(requested, family, make=not reads_only).model
    problems = flip_problems(manifest.augmentation.flip, cache)
    sizes = {(item.width, item.height) for item in manifest.items}
    problems += image_sizes.size_problems(model, family, sizes, requested.pretrained)
    if problems and outdated and not reads_only:
        raise UserError(Problem("prepared-outdated", f"{outdated}. Run `python -m stages.prepare` first."))
    if problems and not outdated:
        raise UserError(*problems)
    warn_of_one_crop(manifest, cache)
    base = component_files.digests(model, (*family.VAE, *family.TEXT))
    device = setup(runtime, model)
    return Context(
        manifest,
        image_reader(manifest.source),
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
        warn(
            "one-random-crop",
            f"{cache.setting('num_variants')}: 1 with dataset.crop random gives each image one crop for the whole "
            "training. Set cache.num_variants to 2 or more.",
        )
    if manifest.augmentation.crop == "center" and not manifest.augmentation.flip and cache.num_variants > 1:
        warn(
            "setting-ignored",
            f"{cache.setting('num_variants')}: {cache.num_variants} has no effect with dataset.crop center and "
            "dataset.flip false. Set cache.num_variants to 1, or change one of the two.",
        )


class FileChanged(Exception):
    """Raised for a file that is missing or was changed since prepare checked it."""


def mask_file(item: Item) -> tuple[str, str | None]:
    """Return name and digest of the file with the mask; for alpha, this is the image itself."""
    return (item.file_name, item.sha256) if item.mask == "alpha" else (str(item.mask), item.mask_sha256)


def read_checked(read: ReadImage, name: str, digest: str | None) -> bytes:
    """Return the file's bytes.

    Raises:
        FileChanged: the file is missing or has another digest.
    """
    try:
        blob = read(name)
    except UserError:
        raise FileChanged(name) from None
    if digest not in (None, hashlib.sha256(blob).hexdigest()):
        raise FileChanged(name)
    return blob


def report_changed_files(work: Callable[[], None], context: Context, items: Iterable[Item]) -> None:
    """Call ``work``. If it meets a changed file, check the files of all the items.

    Raises:
        UserError: a problem per changed file.
    """
    try:
        work()
    except FileChanged as error:
        source = Path(context.manifest.source)
        changed = sorted(changed_files(context, items).items()) or [(str(error), None)]
        raise UserError(
            *(
                problem.at(str(source))
                if problem
                else Problem("file-changed", f"{source / name}: changed since prepare checked it. {RUN_PREPARE}")
                for name, problem in changed
            )
        ) from None


def changed_files(context: Context, items: Iterable[Item]) -> dict[str, Problem | None]:
    """Return images and masks that changed since prepare: name -> why it cannot be read, or None for other bytes."""
    files: dict[str, str | None] = {}
    for item in sorted(items, key=lambda item: natural_key(item.file_name)):
        files[item.file_name] = item.sha256
        if item.mask:
            files |= [mask_file(item)]

    def compare(name: str) -> tuple[bool, Problem | None]:
        """Return whether the bytes are the same, and why the file cannot be read."""
        try:
            blob = context.read(name)
        except UserError as error:
            return False, error.problems[0]
        return files[name] in (None, hashlib.sha256(blob).hexdigest()), None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        results = zip(files, pool.map(compare, files), strict=True)
        return {name: problem for name, (same, problem) in results if not same}
