"""The checked manifest -> VAE mean and std of every view, embeddings of every caption. Only what is new is encoded.

In: data/prepared, the pictures, the base's VAE and text encoder.
Out: data/latents, assembled from the store; reports/latents/metrics.json
Run: ``python -m stages.cache_latents``
     ``--status``  says per picture why its entries are not valid, and what a run would cost: exit code 0 whatever it
                   finds, 2 where there is nothing to look at, such as no data/prepared
     ``--gc``      frees what no committed experiment uses (``--dry-run`` only says how much)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from lora_dag.artifacts import latent_cache, metrics
from lora_dag.artifacts.latent_cache import CachedItem
from lora_dag.artifacts.manifest import Manifest
from lora_dag.artifacts.store import Store
from lora_dag.bases import layout, resolve
from lora_dag.core import params
from lora_dag.core.console import UserError, log, parser, run
from lora_dag.core.device import environment, log_device, setup
from lora_dag.core.files import read_json
from lora_dag.core.locks import writing
from lora_dag.core.params import ModelParams, RuntimeParams
from lora_dag.families.long_texts import warn_of_long
from lora_dag.families.protocol import load_family
from lora_dag.pictures.read import reader
from stages.cache_latents import garbage, notes, status
from stages.cache_latents.context import Context
from stages.cache_latents.encoding import Tensors
from stages.cache_latents.entries import Captions, Masks, Views, attempts, complete, repair
from stages.cache_latents.environments import Origins
from stages.cache_latents.keys import content
from stages.cache_latents.params import CacheParams, flip_problems


def main() -> None:
    args = arguments()
    if args.gc:
        garbage.collect(args.latents, lambda: current_keys(args), dry_run=args.dry_run, force=args.force)
        return
    context = make_context(args)
    if args.status:
        status.show(context, args.prepared, args.latents)
        return
    if context.outdated:
        log.warning("warning: %s; run `python -m stages.prepare` first to use that", context.outdated)
    status.announce(context)
    log_device(context.device, context.model)
    facts = caption_facts(context)
    with writing(args.latents), context.store.in_use():
        masks = Masks(context)  # first: one that hides everything is found before anything is encoded
        masks.fill([key for key in masks.jobs if not context.store.has(masks.kind, key)])
        views, captions = complete(Views, context), complete(Captions, context)
        origins = assemble(args.latents, views, captions, masks)
        notes.remember(views, captions)
    metrics.save(args.latents_reports / "metrics.json", facts | entry_facts(views, captions, masks))
    for line in origins.warnings(context.store):
        log.warning("warning: %s", line)
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
    asked, cache, runtime = config.section(ModelParams), config.section(CacheParams), config.section(RuntimeParams)
    manifest = Manifest.load(args.prepared)
    outdated = status.made_otherwise(manifest, args.prepared, config)
    family = load_family(asked.family)
    model = resolve.resolve(asked, family, make=not (args.status or args.gc)).model
    found = flip_problems(manifest.augmentation.flip, cache.num_variants)
    sizes = {(item.width, item.height) for item in manifest.items}
    found += layout.size_problems(model, family, sizes, asked.pretrained)
    if found and outdated and not args.status:
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


def caption_facts(context: Context) -> dict[str, metrics.Value]:
    """How long the captions are, as metrics; those that are cut are named."""
    captions = sorted(
        {caption for item in context.manifest.items for caption in (item.caption, *context.captions(item))}
    )
    limit = context.family.max_tokens(context.model)
    counts = context.family.count_tokens(context.model, captions)
    num_cut = warn_of_long("caption", captions, counts, limit)
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


def entry_facts(views: Views, captions: Captions, masks: Masks) -> dict[str, metrics.Value]:
    """Of what data/latents is put together. Where memory was short, the settings are not those of params.yaml, and git
    shows why two machines got other bytes.
    """
    return {
        "captions.batch_size": captions.setting.batch_size,
        "latents.batch_size": views.setting.batch_size,
        "latents.tiling": views.setting.tiling,
        "latents.num_views": len(views.jobs),
        "latents.num_masks": len(masks.jobs),
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


def assemble(folder: Path, views: Views, captions: Captions, masks: Masks) -> Origins:
    """Write data/latents from the store. Its manifest goes first and comes last: without it the folder is not read."""
    origins = Origins()
    load = loader({"images": views, "text": captions, "masks": masks}, origins)
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
    return origins


def loader(works: dict[str, Views | Captions | Masks], origins: Origins) -> Callable[[str, str], Tensors]:
    """Reads an entry, checksum included, makes it again if it is damaged, and counts what made it."""

    def load(kind: str, key: str) -> Tensors:
        work = works[kind]
        store = work.context.store
        entry = store.load(work.kind, key)
        if entry is None:
            repair(work)
            entry = store.load(work.kind, key)
        if entry is None:
            raise RuntimeError(
                f"{store.path(work.kind, key)}: vanished while the cache was written; run the stage again"
            )
        origins.add(work.kind, key, entry.made_by)
        return entry.tensors | (work.conditioning(key) if isinstance(work, Views) else {})

    return load


def current_keys(args: argparse.Namespace) -> set[str]:
    """Keys that a run with the present parameters and data/prepared would use, also where memory is short."""
    context = make_context(args)
    works: list[Views | Captions | Masks] = [Masks(context)]
    for build in (Views, Captions):
        works += [build(context, setting) for setting in attempts(context.setting(build.kind), build.kind)]
    return {key for work in works for key in work.jobs}


def log_end(folder: Path, views: Views, captions: Captions) -> None:
    num_encoded = len({views.jobs[key].item.file_name for key in views.encoded})
    log.info("written     %s", folder / "manifest.json")
    log.info("next        python -m stages.train")
    log.info("captions: encoded %d, reused %d", len(captions.encoded), len(captions.jobs) - len(captions.encoded))
    log.info("encoded %d, reused %d", num_encoded, len(views.keys) - num_encoded)


if __name__ == "__main__":
    run(main, kept="every finished batch is kept")
