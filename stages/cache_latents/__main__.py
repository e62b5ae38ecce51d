"""The checked manifest -> VAE mean and std of every view, embeddings of every caption. Only what is new is encoded.

In: data/prepared, the pictures, the base's VAE and text encoder.
Out: data/latents, assembled from the store; reports/latents/metrics.json
Run: ``python -m stages.cache_latents``
     ``--status``  says per picture why its entries are not valid, and what a run would cost; always exit code 0
     ``--gc``      frees what no committed experiment uses (``--dry-run`` only says how much)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from stages.artifacts import latent_cache, metrics
from stages.artifacts.latent_cache import CachedItem
from stages.artifacts.manifest import Manifest
from stages.artifacts.store import Store
from stages.cache_latents import garbage, notes, status
from stages.cache_latents.context import Context
from stages.cache_latents.encoding import Tensors
from stages.cache_latents.entries import Captions, Masks, Views, complete
from stages.cache_latents.keys import content
from stages.cache_latents.params import CacheParams, flip_problems
from stages.core import base_files, params
from stages.core.console import UserError, log, parser, run
from stages.core.containers import PictureFiles
from stages.core.device import log_device, setup
from stages.core.files import read_json
from stages.core.params import ModelParams, RuntimeParams
from stages.families.base import load_family


def main() -> None:
    args = arguments()
    if args.gc:
        garbage.collect(args.latents, lambda: current_keys(args), dry_run=args.dry_run, force=args.force)
        return
    context = make_context(args)
    if args.status:
        status.show(context, args.latents)
        return
    log_device(context.device, context.model)
    facts = caption_facts(context)
    before = notes.Notes.load(context.store)
    with context.store.in_use():
        views = complete(Views, context, before.setting("latents", context.setting("latents")))
        captions = complete(Captions, context, before.setting("text", context.setting("text")))
        masks = Masks(context)
        masks.fill([key for key in masks.jobs if not context.store.has(masks.kind, key)])
        assemble(args.latents, views, captions, masks)
        notes.remember(views, captions, before)
    facts |= {"latents.num_views": len(views.jobs), "latents.num_masks": len(masks.jobs)}
    metrics.save(args.latents_reports / "metrics.json", facts)
    log_end(args.latents, views, captions)


def arguments() -> argparse.Namespace:
    result = parser(__doc__, ("prepared", "latents", "latents_reports"))
    instead = result.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="say what is valid and what a run would cost")
    instead.add_argument("--gc", action="store_true", help="free what no committed experiment uses")
    result.add_argument("--dry-run", action="store_true", help="with --gc: free nothing, say how much it would be")
    result.add_argument("--force", action="store_true", help="with --gc: also where the use cannot all be known")
    args = result.parse_args()
    if (args.dry_run or args.force) and not args.gc:
        result.error("--dry-run and --force go with --gc")
    return args


def make_context(args: argparse.Namespace) -> Context:
    """Everything checked that can be checked before a model is loaded.

    Raises:
        UserError: parameters, manifest, base, picture sizes or device.
    """
    config = params.load(args.params, args.overrides)
    model, cache, runtime = config.section(ModelParams), config.section(CacheParams), config.section(RuntimeParams)
    manifest = Manifest.load(args.prepared)
    require_variants(manifest, cache)
    family = load_family(model.family)
    base_files.require_base(model, family)
    found = base_files.size_problems(model, family, {(item.width, item.height) for item in manifest.items})
    if found:
        raise UserError(*found)
    base = base_files.digests(model, (*family.VAE, *family.TEXT))
    files, device = PictureFiles(manifest.source), setup(runtime, model)
    return Context(manifest, files, family, model, cache, device, base, Store(), runtime.log_every_n_steps)


def require_variants(manifest: Manifest, cache: CacheParams) -> None:
    """Refuse a flip that never happens; warn of a random crop that happens once."""
    found = flip_problems(manifest.augmentation.flip, cache.num_variants)
    if found:
        raise UserError(*found)
    if manifest.augmentation.crop == "random" and cache.num_variants == 1:
        log.warning(
            "warning: params.yaml dataset.crop: random with cache.num_variants 1 is one crop per picture for the whole "
            "training; set cache.num_variants to 2 or more"
        )


def caption_facts(context: Context) -> dict[str, metrics.Value]:
    """How long the captions are, as metrics; those that are cut are named."""
    captions = sorted(
        {caption for item in context.manifest.items for caption in (item.caption, *context.captions(item))}
    )
    limit = context.family.max_tokens(context.model)
    counts = context.family.count_tokens(context.model, captions)
    longest = sorted(zip(counts, captions, strict=True), reverse=True)
    num_cut = sum(count > limit for count in counts)
    if num_cut:
        log.warning("warning: %d captions have more than %d tokens; the rest is not read:", num_cut, limit)
        for count, caption in longest[: min(3, num_cut)]:
            log.warning("  %d tokens: %s", count, caption if len(caption) < 80 else caption[:77] + "...")
    variants = [len(set(item.captions)) for item in context.manifest.items if item.split == "train"] or [1]
    spread = str(max(variants)) if min(variants) == max(variants) else f"{min(variants)} to {max(variants)}"
    log.info("captions    %d distinct; training draws from %s per picture", len(captions), spread)
    return {
        "captions.num": len(captions),
        "captions.num_cut": num_cut,
        "captions.max_tokens": max(counts),
        "captions.tokens_median": statistics.median(counts),
        "captions.tokens_limit": limit,
    }


def cached_items(views: Views, masks: Masks) -> list[CachedItem]:
    """The rows of data/latents, sorted by file name."""
    context = views.context
    return [
        CachedItem(
            file_name=item.file_name,
            split=item.split,
            caption=item.caption,
            captions=context.captions(item),
            content=content(item, context.views(item)[0], context.manifest),
            views=views.keys[item.file_name],
            masks=masks.keys[item.file_name],
            repeats=item.repeats,
            loss_weight=item.loss_weight,
            regularization=item.regularization,
        )
        for item in sorted(context.manifest.items, key=lambda item: item.file_name)
    ]


def assemble(folder: Path, views: Views, captions: Captions, masks: Masks) -> None:
    """Write data/latents from the store. Its manifest goes first and comes last: without it the folder is not read."""
    load = loader({"images": views, "text": captions, "masks": masks})
    (folder / "manifest.json").unlink(missing_ok=True)
    conditioning = sorted(load("text", captions.keys[""]))
    by_view = sorted(views.conditioning(next(iter(views.jobs))))
    items, base = cached_items(views, masks), views.context.base
    latent_cache.write(folder, items, captions.keys, base, conditioning, load, by_view)
    kept = {"manifest.json", *read_json(folder / "manifest.json")["shards"]}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside a folder comes before it
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def loader(works: dict[str, Views | Captions | Masks]) -> Callable[[str, str], Tensors]:
    """Reads an entry once, checksum included, and makes it again if it is damaged."""

    def load(kind: str, key: str) -> Tensors:
        work = works[kind]
        store = work.context.store
        tensors = store.load(work.kind, key)
        if tensors is None:
            work.fill([key])
            tensors = store.load(work.kind, key)
        if tensors is None:
            raise RuntimeError(
                f"{store.path(work.kind, key)}: vanished while the cache was written; run the stage again"
            )
        return tensors | (work.conditioning(key) if isinstance(work, Views) else {})

    return load


def current_keys(args: argparse.Namespace) -> set[str]:
    """Keys that a run with the present parameters and data/prepared would use."""
    context = make_context(args)
    before = notes.Notes.load(context.store)
    views = Views(context, before.setting("latents", context.setting("latents")))
    captions = Captions(context, before.setting("text", context.setting("text")))
    return {*views.jobs, *captions.jobs, *Masks(context).jobs}


def log_end(folder: Path, views: Views, captions: Captions) -> None:
    num_encoded = len({views.jobs[key].item.file_name for key in views.encoded})
    log.info("written     %s", folder / "manifest.json")
    log.info("next        python -m stages.train")
    log.info("captions: encoded %d, reused %d", len(captions.encoded), len(captions.jobs) - len(captions.encoded))
    log.info("encoded %d, reused %d", num_encoded, len(views.keys) - num_encoded)


if __name__ == "__main__":
    run(main)
