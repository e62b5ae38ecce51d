"""The checked manifest -> VAE mean and std of every view, embeddings of every caption. Only what is new is encoded.

In: data/prepared, the pictures, the base's VAE and text encoder.  Out: data/latents, assembled from the store.
Run: ``python -m stages.cache_latents``
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import Field
from tqdm import tqdm

from stages.artifacts import latent_cache
from stages.artifacts.latent_cache import CachedItem
from stages.artifacts.manifest import Item, Manifest, View
from stages.artifacts.store import Kind, Store
from stages.core import base_files, params
from stages.core.console import UserError, log, parser, run
from stages.core.device import autocast, log_device, setup
from stages.core.files import read_json, sha256_file, sha256_json
from stages.core.params import ModelParams, RuntimeParams
from stages.core.pictures import load_view
from stages.families.base import Family, load_family

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of a store entry; raise it when the meaning of its tensors changes
NUM_READERS = 4  # threads that decode pictures

T = TypeVar("T")
Tensors = dict[str, "torch.Tensor"]


class CacheParams(params.Params):
    """Section ``cache``: how pictures and captions go through the frozen encoders."""

    batch_size: int = Field(ge=1, le=1024)
    """Pictures or captions per forward pass. Part of every key: another size moves the last bits (2e-6 in float32)."""


@dataclass(frozen=True)
class Job:
    """A view to encode, and the file that it is cut from."""

    item: Item
    view: View


@dataclass(frozen=True)
class Encoders:
    """What every step below needs."""

    family: Family
    model: ModelParams
    cache: CacheParams
    device: torch.device
    log_every_n_steps: int


def main() -> None:
    args = parser(__doc__, ("prepared", "latents")).parse_args()
    config = params.load(args.params, args.overrides)
    model, cache, runtime = config.section(ModelParams), config.section(CacheParams), config.section(RuntimeParams)
    manifest = Manifest.load(args.prepared)
    family = load_family(model.family)
    base_files.require_base(model, family)
    require_sizes(manifest, model, family)
    warn_long_captions(manifest, model, family)

    encoders = Encoders(family, model, cache, setup(runtime, model), runtime.log_every_n_steps)
    log_device(encoders.device, model)
    base = base_files.digests(model, (*family.VAE, *family.TEXT))
    store = Store()
    items, pictures = cache_pictures(manifest, base, store, encoders)
    keys, captions = cache_captions(manifest, base, store, encoders)
    assemble(args.latents, items, keys, base, store)
    log.info("written     %s", args.latents / "manifest.json")
    log.info("next        python -m stages.train")
    log.info("captions: %s", captions)
    log.info("%s", pictures)


# Checks that need the base


def require_sizes(manifest: Manifest, model: ModelParams, family: Family) -> None:
    sides = {side for item in manifest.items for side in (item.width, item.height)}
    found = base_files.size_problems(model, family, sides)
    if found:
        raise UserError(*found)


def warn_long_captions(manifest: Manifest, model: ModelParams, family: Family) -> None:
    captions = sorted({item.caption for item in manifest.items})
    limit = family.max_tokens(model)
    counts = zip(captions, family.count_tokens(model, captions), strict=True)
    longest = sorted(((count, caption) for caption, count in counts if count > limit), reverse=True)
    if longest:
        log.warning("warning: %d captions have more than %d tokens; the rest is not read:", len(longest), limit)
        for count, caption in longest[:3]:
            log.warning("  %d tokens: %s", count, caption if len(caption) < 80 else caption[:77] + "...")


# Pictures


def cache_pictures(
    manifest: Manifest, base: dict[str, str], store: Store, encoders: Encoders
) -> tuple[list[CachedItem], str]:
    """Encode the views that the store lacks; the rows of the cache, and ``encoded N, reused M`` in pictures.

    Raises:
        UserError: a picture is not the one that prepare checked.
    """
    vae = {name: base[name] for name in encoders.family.VAE}
    items: list[CachedItem] = []
    missing: dict[str, Job] = {}
    num_encoded = 0
    for item in manifest.items:
        keys = tuple(picture_key(item, view, manifest, vae, encoders) for view in item.views)
        content = sha256_json(shown(item, item.views[0], manifest))
        items.append(CachedItem(item.file_name, item.split, item.caption, content, keys))
        new = {
            key: Job(item, view)
            for key, view in zip(keys, item.views, strict=True)
            if key not in missing and store.find("latents", key) is None
        }
        missing |= new
        num_encoded += bool(new)
    if missing:
        encode_pictures(missing, manifest, store, encoders)
    return items, f"encoded {num_encoded}, reused {len(items) - num_encoded}"


def picture_key(item: Item, view: View, manifest: Manifest, vae: dict[str, str], encoders: Encoders) -> str:
    """Digest of all that decides the latents of one view; the file's name and the folder are no part of it.

    Versions, processor model and thread count are left out though they can move the last bits: they differ between the
    machines that share a store, and a library update would encode everything again.
    """
    return sha256_json(shown(item, view, manifest) | {"vae": vae} | common_key(encoders))


def shown(item: Item, view: View, manifest: Manifest) -> dict[str, Any]:
    """All that decides the pixels of one view, whatever encodes them."""
    return {
        "picture": item.sha256,
        "crop": view.crop,
        "flip": view.flip,
        "size": [item.width, item.height],
        "preprocessing": manifest.preprocessing,
    }


def caption_key(caption: str, text: dict[str, str], encoders: Encoders) -> str:
    return sha256_json({"caption": caption, "text": text} | common_key(encoders))


def common_key(encoders: Encoders) -> dict[str, Any]:
    return {
        "family": encoders.model.family,
        "dtype": encoders.model.dtype,
        "device": encoders.device.type,
        "batch_size": encoders.cache.batch_size,
        "format": FORMAT,
    }


def encode_pictures(missing: dict[str, Job], manifest: Manifest, store: Store, encoders: Encoders) -> None:
    import torch

    require_unchanged(missing, manifest)
    vae = encoders.family.load_vae(encoders.model, encoders.device)

    def read(key: str) -> torch.Tensor:
        item, view = missing[key].item, missing[key].view
        image = load_view(Path(manifest.source) / item.file_name, item, view, manifest.preprocessing)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # [3, H, W] in [-1, 1]

    def encode(pixel_values: list[torch.Tensor]) -> Tensors:
        mean, std = encoders.family.encode_images(vae, torch.stack(pixel_values))
        return {"mean": mean, "std": std}  # [B, C, H/f, W/f]

    by_size = defaultdict(list)
    for key, job in missing.items():
        by_size[job.item.width, job.item.height].append(key)
    for (width, height), keys in by_size.items():
        encode_all("latents", keys, read, encode, torch.zeros(3, height, width), store, encoders)


def require_unchanged(missing: dict[str, Job], manifest: Manifest) -> None:
    problems = []
    for item in dict.fromkeys(job.item for job in missing.values()):
        path = Path(manifest.source) / item.file_name
        if not path.is_file():
            problems.append(f"{path}: gone since prepare listed it; run `python -m stages.prepare` again")
        elif sha256_file(path) != item.sha256:
            problems.append(f"{path}: changed since prepare checked it; run `python -m stages.prepare` again")
    if problems:
        raise UserError(*problems)


# Captions


def cache_captions(
    manifest: Manifest, base: dict[str, str], store: Store, encoders: Encoders
) -> tuple[dict[str, str], str]:
    """Encode the captions that the store lacks, the empty one included; caption -> key, and the counts."""
    text = {name: base[name] for name in encoders.family.TEXT}
    captions = sorted({"", *(item.caption for item in manifest.items)})
    keys = {caption: caption_key(caption, text, encoders) for caption in captions}
    missing = [caption for caption in captions if store.find("text", keys[caption]) is None]
    if missing:
        encode_captions(missing, keys, store, encoders)
    return keys, f"encoded {len(missing)}, reused {len(captions) - len(missing)}"


def encode_captions(missing: list[str], keys: dict[str, str], store: Store, encoders: Encoders) -> None:
    text = encoders.family.load_text(encoders.model, encoders.device)
    by_key = {keys[caption]: caption for caption in missing}

    def encode(captions: list[str]) -> Tensors:
        return encoders.family.encode_prompts(text, captions)

    encode_all("text", list(by_key), by_key.__getitem__, encode, "", store, encoders)


# Both


def encode_all(
    kind: Kind,
    keys: list[str],
    read: Callable[[str], T],
    encode: Callable[[list[T]], Tensors],
    padding: T,
    store: Store,
    encoders: Encoders,
) -> None:
    """Encode and store one entry per key, ``cache.batch_size`` at a time.

    Every batch is filled up to the full size: kernels are chosen by shape, and another batch size gives other last bits
    (2e-6 in float32 on a CPU). At one shape an entry does not depend on its place or its neighbours, so that one edited
    picture gives the bytes that encoding everything anew would give; the first batch proves it.

    Raises:
        UserError: that does not hold on this device, memory is too small, or an entry is not finite.
    """
    size = encoders.cache.batch_size
    with ThreadPoolExecutor(NUM_READERS) as pool, progress(kind, len(keys), encoders.log_every_n_steps) as advance:
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            values = list(pool.map(read, batch))
            entries = forward(encode, values + [padding] * (size - len(values)), encoders)
            for tensors in entries:
                require_finite(kind, tensors, encoders.model)
            if start == 0 and size > 1:
                alone = forward(encode, [padding] * (size - 1) + values[:1], encoders)[-1]
                require_independent(entries[0], alone, size)
            for key, tensors in zip(batch, entries, strict=False):  # what is left over is padding
                store.save(kind, key, tensors)
            advance(len(batch))


def forward(encode: Callable[[list[T]], Tensors], values: list[T], encoders: Encoders) -> list[Tensors]:
    """The tensors of each value, without the batch dimension."""
    import torch

    try:
        with autocast(encoders.device, encoders.model):
            encoded = encode(values)
    except torch.cuda.OutOfMemoryError:
        size = encoders.cache.batch_size
        raise UserError(f"params.yaml cache.batch_size: {size} does not fit into the GPU's memory; lower it") from None
    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    return [{name: tensor[index].clone() for name, tensor in encoded.items()} for index in range(len(values))]


def require_independent(first: Tensors, alone: Tensors, size: int) -> None:
    import torch

    if any(not torch.equal(first[name], alone[name]) for name in first):
        raise UserError(
            f"params.yaml cache.batch_size: with {size} on this device, what an entry is depends on its neighbours,"
            " and a partly filled store would not give the same bytes; use 1"
        )


def require_finite(kind: Kind, tensors: Tensors, model: ModelParams) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        cure = "fetch model.pretrained again" if model.dtype == "float32" else "use float32"
        raise UserError(f"params.yaml model.dtype: {model.dtype} gives {kind} that are not finite; {cure}")


@contextlib.contextmanager
def progress(kind: Kind, total: int, log_every_n_steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line every n batches. Yields what to call with the number done."""
    done, num_calls, start = 0, 0, time.monotonic()
    with tqdm(total=total, desc=kind, disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            nonlocal done, num_calls
            done, num_calls = done + count, num_calls + 1
            bar.update(count)
            if bar.disable and num_calls % log_every_n_steps == 0:
                rate = done / (time.monotonic() - start)
                log.info("%-8s %7d / %d  %8.1f /s  %6.0f s left", kind, done, total, rate, (total - done) / rate)

        yield advance


def assemble(
    folder: Path, items: list[CachedItem], captions: dict[str, str], base: dict[str, str], store: Store
) -> None:
    """Write data/latents from the store. Its manifest goes first and comes last: without it the folder is not read."""

    def load(kind: str, key: str) -> Tensors:
        tensors = store.find("latents" if kind == "images" else "text", key)
        if tensors is None:
            raise RuntimeError(f"{store.root}: entry {key} vanished while the cache was written; run the stage again")
        return tensors

    (folder / "manifest.json").unlink(missing_ok=True)
    conditioning = sorted(load("text", captions[""]))
    latent_cache.write(folder, items, captions, base, conditioning, load)
    kept = {"manifest.json", *read_json(folder / "manifest.json")["shards"]}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside a folder comes before it
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    run(main)
