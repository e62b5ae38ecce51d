"""Shows which encoded images and captions are valid, and why the others are not. Writes nothing.

It reads every image and every entry. The exit code is 0 also if entries are not valid, as for ``git status`` and
``dvc status``; it is 2 if there is no data/prepared.
Run: ``lora-dag status``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import Problem, add_settings, log, plural, warn
from lora_dag.core.params import load
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context, changed_files, make_context
from stages.cache_latents.environments import EnvironmentMix
from stages.cache_latents.keys import Setting
from stages.cache_latents.last_run import ItemInputs, LastRun, item_inputs
from stages.cache_latents.latents import LatentEncoder
from stages.cache_latents.masks import MaskBuilder

MAX_PER_REASON = 10
"""Images with the same reason that have a line each; more of them share one line."""
MAX_LINES = 30
"""Lines on images that are not valid."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["prepared", "latents"])


def main(args: argparse.Namespace) -> None:
    context = make_context(load(args.params, args.overrides), args.prepared, reads_only=True)
    log_status(context, args.prepared, args.latents)


def log_status(context: Context, prepared: Path, latents: Path) -> None:
    """Log the state of every entry, then what a run would encode."""
    if context.outdated:
        log.info("%s. Run prepare first. The lines below describe %s as it is.", context.outdated, prepared)
    last_run, environments = LastRun.load(context.store), EnvironmentMix()
    views = LatentEncoder(context, last_run.expected_setting("latents", context.requested_setting("latents")))
    captions = CaptionEncoder(context, last_run.expected_setting("text", context.requested_setting("text")))
    masks = MaskBuilder(context)
    unusable = {
        work.kind: unusable_entries(context.store, work.kind, work.jobs, environments)
        for work in (views, captions, masks)
    }
    drop_convertible(unusable["text"], captions, environments)
    changed = changed_files(context, context.manifest.items)
    reasons = {
        item.file_name: file_changes(item, changed) or invalid_reasons(item, last_run, views, captions, masks, unusable)
        for item in sorted(context.manifest.items, key=lambda item: item.file_name)
    }
    log_images(reasons)
    log_empty_caption(captions, unusable["text"], last_run)
    if changed:
        log.info("prepare must run first: run `python -m stages.prepare` or `dvc repro`")
    if not any((*reasons.values(), *unusable.values())) and not (latents / "manifest.json").exists():
        log.info("%s is missing; a run assembles it again from the store", latents)
    for problem in (*fallbacks(views, captions), *environments.problems(context.store)):
        warn(problem.code, problem)
    edited = {key for name, problem in changed.items() if not problem for key in views.keys.get(name, ())}
    log_work(len({*unusable["latents"], *edited}), len(unusable["text"]))
    source = Path(context.manifest.source)
    if changed or has_newer(source, prepared / "manifest.jsonl"):
        log.info("%s changed since prepare ran. Run prepare to see changed captions and new images here.", source)


def log_images(reasons: dict[str, list[str]]) -> None:
    """Log the images that are not valid, a line per image or per reason, and the counts.

    Args:
        reasons: file name -> why its entries are not valid; empty for a valid image.
    """
    names: dict[str, list[str]] = {}
    for name, texts in reasons.items():
        if texts:
            names.setdefault(", ".join(texts), []).append(name)
    lines = []
    for reason, group in names.items():
        if len(group) > MAX_PER_REASON:
            lines.append((f"{plural(len(group), 'image')}, the first is {group[0]}: {reason}", len(group)))
        else:
            lines += [(f"{name}: {reason}", 1) for name in group]
    for line, _ in sorted(lines, key=lambda line: line[1] > 1)[:MAX_LINES]:
        log.info("%s", line)
    if hidden := sum(count for _, count in sorted(lines, key=lambda line: line[1] > 1)[MAX_LINES:]):
        log.info("%s more: not listed", plural(hidden, "image"))
    num_invalid = sum(map(bool, reasons.values()))
    log.info("%s: %d valid, %d not valid", plural(len(reasons), "image"), len(reasons) - num_invalid, num_invalid)


def log_empty_caption(captions: CaptionEncoder, unusable: dict[str, str], last_run: LastRun) -> None:
    key = captions.keys[""]
    if key in unusable:
        texts = setting_changes(last_run, "text", captions.setting) or [unusable[key]]
        log.info("empty caption: %s", ", ".join(texts))


def log_work(num_views: int, num_captions: int) -> None:
    work = f"{plural(num_views, 'view')} and {plural(num_captions, 'caption')}"
    log.info("a run would encode %s", work if num_views or num_captions else "nothing")


def unusable_entries(store: Store, kind: Kind, keys: Iterable[str], environments: EnvironmentMix) -> dict[str, str]:
    """Return missing and damaged entries: key -> reason. The origins of sound entries go into ``environments``."""
    reasons = {}
    for key in keys:
        entry = store.load(kind, key)
        if entry is not None:
            environments.add(kind, key, entry.made_by)
        else:
            exists = store.path(kind, key).exists()
            reasons[key] = "entry damaged" if exists else "entry missing from the store"
    return reasons


def drop_convertible(unusable: dict[str, str], captions: CaptionEncoder, environments: EnvironmentMix) -> None:
    """Remove the captions that a run converts from an earlier version instead of encoding them."""
    for key in list(unusable):
        entry = captions.load_earlier(key)
        if entry is not None:
            environments.add("text", key, entry.made_by)
            del unusable[key]


def fallbacks(*works: LatentEncoder | CaptionEncoder) -> list[Problem]:
    """Return a warning for each kind for which the last run had too little memory, as the next run tries again."""
    problems = []
    for work in works:
        requested, used = work.context.requested_setting(work.kind), work.setting
        if requested != used:
            tiles = " and cache.tiling: true" if used.tiling and not requested.tiling else ""
            problems.append(
                Problem(
                    "encoder-fallback",
                    f"{work.context.cache.setting('batch_size')}: {requested.batch_size} did not fit into memory in "
                    f"the last run ({work.kind}), and the next run tries it again. "
                    f"Set cache.batch_size: {used.batch_size}{tiles} to keep the entries that are valid here.",
                )
            )
    return problems


def file_changes(item: Item, changed: Mapping[str, Problem | None]) -> list[str]:
    """Return how the image or its mask changed since prepare checked it; empty for no change."""
    if item.file_name in changed:
        problem = changed[item.file_name]
        return [f"unreadable ({problem})" if problem else "pixels changed"]
    if item.mask is not None and item.mask in changed:
        problem = changed[item.mask]
        return [f"mask unreadable ({problem})" if problem else "mask changed"]
    return []


def invalid_reasons(
    item: Item,
    last_run: LastRun,
    views: LatentEncoder,
    captions: CaptionEncoder,
    masks: MaskBuilder,
    unusable: dict[Kind, dict[str, str]],
) -> list[str]:
    """Return why an image's entries are not all valid; empty for a valid image."""
    context = views.context
    keys: dict[Kind, Iterable[str]] = {
        "latents": views.keys[item.file_name],
        "masks": masks.keys[item.file_name],
        "text": [captions.keys[caption] for caption in dict.fromkeys((item.caption, *context.captions(item)))],
    }
    bad = {kind: [unusable[kind][key] for key in keys[kind] if key in unusable[kind]] for kind in keys}
    if not any(bad.values()):
        return []
    then = last_run.items.get(item.file_name)
    if then is None:
        return ["new"]
    now = item_inputs(context, item)
    reasons: list[str] = []
    if bad["latents"]:
        reasons += view_changes(then, now) + preprocessing_changes(item, context, last_run)
        reasons += setting_changes(last_run, "latents", views.setting)
    if bad["masks"]:
        reasons += mask_changes(then, now, context, last_run)
    if bad["text"]:
        reasons += ["caption changed"] if then.captions != now.captions else []
        reasons += setting_changes(last_run, "text", captions.setting)
    return list(dict.fromkeys(reasons or [*bad["latents"], *bad["text"], *bad["masks"]]))


def view_changes(then: ItemInputs, now: ItemInputs) -> list[str]:
    changes = []
    if then.image != now.image:
        changes.append("pixels changed")
    if then.size != now.size:
        changes.append(f"size changed ({size_text(then)} -> {size_text(now)})")
    elif [view for view in then.views if view not in now.views] and "pixels changed" not in changes:
        changes.append("crop changed")
    if len(then.views) < len(now.views):
        changes.append(f"variants {len(then.views)} -> {len(now.views)}")
    return changes


def preprocessing_changes(item: Item, context: Context, last_run: LastRun) -> list[str]:
    now = context.manifest.preprocessing
    differ = [name for name, value in now.items() if last_run.preprocessing.get(name) != value]
    if not item.transparent and "background" in differ:  # the keys of opaque images do not depend on it
        differ.remove("background")
    return [f"preprocessing changed ({', '.join(differ)})"] if differ else []


def mask_changes(then: ItemInputs, now: ItemInputs, context: Context, last_run: LastRun) -> list[str]:
    if then.mask != now.mask:
        return ["mask changed"]
    before, after = last_run.unmasked_weight, context.manifest.unmasked_weight
    return [f"unmasked_weight {before} -> {after}"] if before != after else []


def setting_changes(last_run: LastRun, kind: Kind, setting: Setting) -> list[str]:
    """Return such as ``another VAE`` and ``dtype float32 -> bfloat16``."""
    before = last_run.used.get(kind)
    if before is None:
        return []
    changes = []
    if before.components != setting.components:
        changes.append("another VAE" if kind == "latents" else "another text encoder")
    old, new = before.key_fields(), setting.key_fields()
    return changes + [
        f"{name} {old.get(name, False)} -> {new.get(name, False)}".replace("True", "true").replace("False", "false")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def size_text(inputs: ItemInputs) -> str:
    return "x".join(map(str, inputs.size))


def has_newer(source: Path, manifest: Path) -> bool:
    """Return whether a file of the dataset is newer than the manifest. No digest covers the files with captions."""
    since = manifest.stat().st_mtime_ns
    paths = source.rglob("*") if source.is_dir() else [source]
    return any(path.is_file() and path.stat().st_mtime_ns > since for path in paths)
