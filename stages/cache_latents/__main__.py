"""The checked manifest -> VAE mean and std of every view, embeddings of every caption. Only what is new is encoded.

In: data/prepared, the pictures, the base's VAE and text encoder.
Out: data/latents, assembled from the store; reports/latents/metrics.json
Run: ``python -m stages.cache_latents``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from lora_dag.artifacts import latent_cache, metrics
from lora_dag.artifacts.latent_cache import CachedItem
from lora_dag.core import params
from lora_dag.core.console import log, parser, run
from lora_dag.core.device import log_device
from lora_dag.core.files import read_json
from lora_dag.core.locks import writing
from lora_dag.families.long_texts import warn_of_long
from stages.cache_latents import last_run
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context, make_context
from stages.cache_latents.encoding import Tensors
from stages.cache_latents.environments import Origins
from stages.cache_latents.filling import Entries, complete, repair
from stages.cache_latents.keys import content
from stages.cache_latents.latents import LatentEncoder
from stages.cache_latents.masks import MaskBuilder


def main() -> None:
    args = parser(__doc__, ("prepared", "latents", "latents_reports")).parse_args()
    context = make_context(params.load(args.params, args.overrides), args.prepared)
    if context.outdated:
        log.warning("warning: %s; run `python -m stages.prepare` first to use that", context.outdated)
    log_device(context.device, context.model)
    facts = caption_facts(context)
    with writing(args.latents), context.store.in_use():
        masks = MaskBuilder(context)  # first: one that hides everything is found before anything is encoded
        masks.fill([key for key in masks.jobs if not context.store.has(masks.kind, key)])
        views, captions = complete(LatentEncoder, context), complete(CaptionEncoder, context)
        origins = assemble(args.latents, views, captions, masks)
        last_run.remember(views, captions)
    metrics.save(args.latents_reports / "metrics.json", facts | entry_facts(views, captions, masks))
    for line in origins.warnings(context.store):
        log.warning("warning: %s", line)
    log_end(args.latents, views, captions)


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


def entry_facts(views: LatentEncoder, captions: CaptionEncoder, masks: MaskBuilder) -> dict[str, metrics.Value]:
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


def cached_items(views: LatentEncoder, masks: MaskBuilder) -> list[CachedItem]:
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


def assemble(folder: Path, views: LatentEncoder, captions: CaptionEncoder, masks: MaskBuilder) -> Origins:
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


def loader(works: dict[str, Entries], origins: Origins) -> Callable[[str, str], Tensors]:
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
        store.touch(work.kind, key)
        origins.add(work.kind, key, entry.made_by)
        return entry.tensors | (work.conditioning(key) if isinstance(work, LatentEncoder) else {})

    return load


def log_end(folder: Path, views: LatentEncoder, captions: CaptionEncoder) -> None:
    num_encoded = len({views.jobs[key].item.file_name for key in views.encoded})
    log.info("written     %s", folder / "manifest.json")
    log.info("next        python -m stages.train")
    log.info("captions: encoded %d, reused %d", len(captions.encoded), len(captions.jobs) - len(captions.encoded))
    log.info("encoded %d, reused %d", num_encoded, len(views.keys) - num_encoded)


if __name__ == "__main__":
    run(main, kept="every finished batch is kept")
