"""Stage 2: encode images with the VAE and captions with the text encoders. Only new or changed ones are encoded.

In: data/prepared, the images, the base model's VAE and text encoders.
Out: data/latents, assembled from the store: mean and std of each view, embeddings of each caption, masks;
    reports/latents/metrics.json
Run: ``python -m stages.cache_latents``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from lora_dag.artifacts import latent_cache, metrics, packing
from lora_dag.artifacts.latent_cache import CachedItem
from lora_dag.core import params
from lora_dag.core.console import log, parser, run, warn
from lora_dag.core.device import log_device
from lora_dag.core.files import read_json
from lora_dag.core.locks import writing
from lora_dag.core.stage_start import log_stage_start
from lora_dag.families.long_texts import warn_of_long
from stages.cache_latents import last_run
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context, make_context
from stages.cache_latents.encoding import Tensors
from stages.cache_latents.environments import EnvironmentMix
from stages.cache_latents.fill_store import EntryMaker, encode_missing, remake_damaged
from stages.cache_latents.keys import content_digest
from stages.cache_latents.latents import LatentEncoder
from stages.cache_latents.masks import MaskBuilder


def main() -> None:
    args = parser(__doc__, ("prepared", "latents", "latents_reports")).parse_args()
    config = params.load(args.params, args.overrides)
    log_stage_start("cache_latents", config, args)
    context = make_context(config, args.prepared)
    if context.outdated:
        warn("prepared-outdated", f"{context.outdated}. Run `python -m stages.prepare` to use the new values.")
    log_device(context.device, context.model)
    caption_values = caption_metrics(context)
    with writing(args.latents), context.store.in_use():
        masks = MaskBuilder(context)  # first: a mask that hides everything stops the stage before anything is encoded
        masks.fill([key for key in masks.jobs if not context.store.has(masks.kind, key)])
        views, captions = encode_missing(LatentEncoder, context), encode_missing(CaptionEncoder, context)
        environments = assemble(args.latents, views, captions, masks)
        last_run.write_last_run(views, captions)
    metrics.save(args.latents_reports / "metrics.json", caption_values | setting_metrics(views, captions, masks))
    for problem in environments.problems(context.store):
        warn(problem.code, problem)
    log_end(args.latents, views, captions)


def caption_metrics(context: Context) -> dict[str, metrics.Value]:
    """Return the lengths of the captions in tokens, as metrics, and warn of captions that are cut."""
    captions = sorted(
        {caption for item in context.manifest.items for caption in (item.caption, *context.captions(item))}
    )
    limit = context.family.max_tokens(context.model)
    counts = context.family.count_tokens(context.model, captions)
    num_cut = warn_of_long("caption", captions, counts, limit)
    variants = [len(set(item.captions)) for item in context.manifest.items if item.split == "train"] or [1]
    spread = str(max(variants)) if min(variants) == max(variants) else f"{min(variants)} to {max(variants)}"
    log.info("captions    %d distinct; training draws from %s per image", len(captions), spread)
    return {
        "captions.num": len(captions),
        "captions.num_cut": num_cut,
        "captions.max_tokens": max(counts),
        "captions.tokens_median": statistics.median(counts),
        "captions.tokens_limit": limit,
    }


def setting_metrics(views: LatentEncoder, captions: CaptionEncoder, masks: MaskBuilder) -> dict[str, metrics.Value]:
    """Return the number of entries and the settings that encoded them, as metrics.

    Where memory was short, these settings differ from params.yaml, and git shows why two machines got other bytes.
    """
    return {
        "captions.batch_size": captions.setting.batch_size,
        "latents.batch_size": views.setting.batch_size,
        "latents.tiling": views.setting.tiling,
        "latents.num_views": len(views.jobs),
        "latents.num_masks": len(masks.jobs),
    }


def cached_items(views: LatentEncoder, masks: MaskBuilder) -> list[CachedItem]:
    """Return the rows of data/latents, sorted by file name."""
    context = views.context
    return [
        CachedItem(
            file_name=item.file_name,
            split=item.split,
            caption=item.caption,
            captions=context.captions(item),
            content=content_digest(item, context.views(item)[0], context.manifest),
            views=views.keys[item.file_name],
            masks=masks.keys[item.file_name],
            repeats=item.repeats,
            loss_weight=item.loss_weight,
            regularization=item.regularization,
        )
        for item in sorted(context.manifest.items, key=lambda item: item.file_name)
    ]


def assemble(folder: Path, views: LatentEncoder, captions: CaptionEncoder, masks: MaskBuilder) -> EnvironmentMix:
    """Write data/latents from the store, and return the environments that made its entries.

    The manifest is deleted first and written last: without it no stage reads the folder.
    """
    environments = EnvironmentMix()
    load = make_loader({"images": views, "text": captions, "masks": masks}, environments)
    (folder / "manifest.json").unlink(missing_ok=True)
    conditioning = packing.names(load("text", captions.keys[""]))
    by_view = sorted(views.conditioning(next(iter(views.jobs))))
    items, base = cached_items(views, masks), views.context.base
    latent_cache.write(folder, items, captions.keys, base, conditioning, load, by_view, captions.form)
    current = {"manifest.json", *read_json(folder / "manifest.json")["shards"]}
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
        if path.is_file() and path.relative_to(folder).as_posix() not in current:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return environments


def make_loader(works: dict[str, EntryMaker], environments: EnvironmentMix) -> Callable[[str, str], Tensors]:
    """Return a function that reads an entry, makes it again if it is damaged, and records its environment."""

    def load(kind: str, key: str) -> Tensors:
        work = works[kind]
        store = work.context.store
        entry = store.load(work.kind, key)
        if entry is None:
            remake_damaged(work)
            entry = store.load(work.kind, key)
        if entry is None:
            raise RuntimeError(
                f"{store.path(work.kind, key)}: disappeared while the cache was written. Run the stage again."
            )
        store.touch(work.kind, key)
        environments.add(work.kind, key, entry.made_by)
        return entry.tensors | (work.conditioning(key) if isinstance(work, LatentEncoder) else {})

    return load


def log_end(folder: Path, views: LatentEncoder, captions: CaptionEncoder) -> None:
    num_encoded = len({views.jobs[key].item.file_name for key in views.encoded})
    log.info("captions    encoded %d, reused %d", len(captions.encoded), len(captions.jobs) - len(captions.encoded))
    log.info("images      encoded %d, reused %d", num_encoded, len(views.keys) - num_encoded)
    log.info("wrote       %s", folder / "manifest.json")
    log.info("next        python -m stages.train")


if __name__ == "__main__":
    run(main, kept="every finished batch is kept")
