"""Which encoded pictures and captions are valid, and why the others are not. Writes nothing.

Reads every picture and every entry, so that its word can be relied on. The exit code is 0 whatever it finds, as that of
``git status`` and ``dvc status``, and 2 where there is nothing to look at, such as no data/prepared.
Run: ``lora-dag status``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import add_settings, log, plural
from lora_dag.core.params import load
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context, changes, make_context
from stages.cache_latents.environments import Origins
from stages.cache_latents.keys import Setting
from stages.cache_latents.last_run import LastRun, MadeOf, made_of
from stages.cache_latents.latents import LatentEncoder
from stages.cache_latents.masks import MaskBuilder

EMPTY = "(empty caption)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["prepared", "latents"])


def main(args: argparse.Namespace) -> None:
    context = make_context(load(args.params, args.overrides), args.prepared, reads_only=True)
    show(context, args.prepared, args.latents)


def show(context: Context, prepared: Path, latents: Path) -> None:
    if context.outdated:
        log.info("%s: prepare runs first; what follows is for %s as it is", context.outdated, prepared)
    last, origins = LastRun.load(context.store), Origins()
    views = LatentEncoder(context, last.expected("latents", context.setting("latents")))
    captions = CaptionEncoder(context, last.expected("text", context.setting("text")))
    masks = MaskBuilder(context)
    state = {work.kind: look(context.store, work.kind, work.jobs, origins) for work in (views, captions, masks)}
    edited = changes(context, context.manifest.items)

    reasons = {
        item.file_name: on_disk(item, edited) or explain(item, last, views, captions, masks, state)
        for item in sorted(context.manifest.items, key=lambda item: item.file_name)
    }
    num_bad = sum(map(bool, reasons.values()))
    if captions.keys[""] in state["text"]:
        reasons[EMPTY] = setting_changes(last, "text", captions.setting) or [state["text"][captions.keys[""]]]
    for name, found in reasons.items():
        if found:
            log.info("%s: %s", name, ", ".join(found))
    num_pictures = len(context.manifest.items)
    log.info("%s: %d valid, %d not", plural(num_pictures, "picture"), num_pictures - num_bad, num_bad)
    if edited:
        log.info("prepare must run first: python -m stages.prepare, or dvc repro")
    if not any(reasons.values()) and not (latents / "manifest.json").exists():
        log.info("%s is not there; a run puts it together again from the store", latents)
    for line in (*fallbacks(views, captions), *origins.warnings(context.store)):
        log.warning("warning: %s", line)
    again = {key for name, reason in edited.items() if not reason for key in views.keys.get(name, ())}
    log_work(len({*state["latents"], *again}), len(state["text"]))
    source = Path(context.manifest.source)
    if edited or has_newer(source, prepared / "manifest.jsonl"):
        log.info("%s: edits there since prepare ran, of captions too, show after prepare", source)


def log_work(num_views: int, num_captions: int) -> None:
    work = f"{plural(num_views, 'view')} and {plural(num_captions, 'caption')}"
    log.info("a run would encode %s", work if num_views or num_captions else "nothing")


def look(store: Store, kind: Kind, keys: Iterable[str], origins: Origins) -> dict[str, str]:
    """Entries that cannot be used: key -> why. Of the others, what made them is added to ``origins``."""
    found = {}
    for key in keys:
        entry = store.load(kind, key)
        if entry is not None:
            origins.add(kind, key, entry.made_by)
        else:
            there = store.path(kind, key).exists()
            found[key] = "entry damaged" if there else "entry missing from the store"
    return found


def fallbacks(*works: LatentEncoder | CaptionEncoder) -> list[str]:
    """A line for each kind for which the last run found too little memory; the next one will try again."""
    lines = []
    for work in works:
        asked, used = work.context.setting(work.kind), work.setting
        if asked != used:
            tiles = " and cache.tiling: true" if used.tiling and not asked.tiling else ""
            lines.append(
                f"{work.kind}: cache.batch_size {asked.batch_size} did not fit into memory in the last run; the next "
                "one tries again, and encodes everything anew if it fits by then; set cache.batch_size: "
                f"{used.batch_size}{tiles} to stay with what is valid here"
            )
    return lines


def on_disk(item: Item, edited: dict[str, str | None]) -> list[str]:
    """What happened to the picture since prepare checked it."""
    if item.file_name in edited:
        reason = edited[item.file_name]
        return [f"gone ({reason})" if reason else "pixels changed"]
    if item.mask in edited:
        reason = edited[item.mask]
        return [f"mask gone ({reason})" if reason else "mask changed"]
    return []


def explain(
    item: Item,
    last: LastRun,
    views: LatentEncoder,
    captions: CaptionEncoder,
    masks: MaskBuilder,
    state: dict[Kind, dict[str, str]],
) -> list[str]:
    """Why a picture's entries are not all valid; empty where they are."""
    context = views.context
    bad = {
        "latents": [state["latents"][key] for key in views.keys[item.file_name] if key in state["latents"]],
        "masks": [state["masks"][key] for key in masks.keys[item.file_name] if key in state["masks"]],
        "text": [
            state["text"][captions.keys[caption]]
            for caption in dict.fromkeys((item.caption, *context.captions(item)))
            if captions.keys[caption] in state["text"]
        ],
    }
    if not any(bad.values()):
        return []
    then = last.items.get(item.file_name)
    if then is None:
        return ["new"]
    now = made_of(context, item)
    found: list[str] = []
    if bad["latents"]:
        found += view_changes(then, now) + preprocessing_changes(item, context, last)
        found += setting_changes(last, "latents", views.setting)
    if bad["masks"]:
        found += mask_changes(then, now, context, last)
    if bad["text"]:
        found += ["caption changed"] if then.captions != now.captions else []
        found += setting_changes(last, "text", captions.setting)
    return list(dict.fromkeys(found or [*bad["latents"], *bad["text"], *bad["masks"]]))


def view_changes(then: MadeOf, now: MadeOf) -> list[str]:
    found = []
    if then.picture != now.picture:
        found.append("pixels changed")
    if then.size != now.size:
        found.append(f"size changed ({size(then)} -> {size(now)})")
    elif [view for view in then.views if view not in now.views] and "pixels changed" not in found:
        found.append("crop changed")
    if len(then.views) < len(now.views):
        found.append(f"variants {len(then.views)} -> {len(now.views)}")
    return found


def preprocessing_changes(item: Item, context: Context, last: LastRun) -> list[str]:
    now = context.manifest.preprocessing
    differ = [name for name, value in now.items() if last.preprocessing.get(name) != value]
    if not item.transparent and "background" in differ:  # no part of its keys
        differ.remove("background")
    return [f"preprocessing changed ({', '.join(differ)})"] if differ else []


def mask_changes(then: MadeOf, now: MadeOf, context: Context, last: LastRun) -> list[str]:
    if then.mask != now.mask:
        return ["mask changed"]
    before, after = last.unmasked_weight, context.manifest.unmasked_weight
    return [f"unmasked_weight {before} -> {after}"] if before != after else []


def setting_changes(last: LastRun, kind: Kind, setting: Setting) -> list[str]:
    """Such as ``another VAE`` and ``dtype float32 -> bfloat16``."""
    before = last.used.get(kind)
    if before is None:
        return []
    found = []
    if before.components != setting.components:
        found.append("another VAE" if kind == "latents" else "another text encoder")
    old, new = before.ingredients(), setting.ingredients()
    return found + [
        f"{name} {old.get(name, False)} -> {new.get(name, False)}".replace("True", "true").replace("False", "false")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def size(made_of: MadeOf) -> str:
    return "x".join(map(str, made_of.size))


def has_newer(source: Path, made: Path) -> bool:
    """Whether any file of the dataset was written after ``made``: captions stand in files that have no digest."""
    since = made.stat().st_mtime_ns
    paths = source.rglob("*") if source.is_dir() else [source]
    return any(path.is_file() and path.stat().st_mtime_ns > since for path in paths)
