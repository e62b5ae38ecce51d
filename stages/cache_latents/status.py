"""``python -m stages.cache_latents --status``: why entries are not valid, and what a run would cost. Writes nothing.

Reads every picture and every entry, so that its word can be relied on. The exit code is 0 whatever it finds, as that of
``git status`` and ``dvc status``, and 2 where there is nothing to look at.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_dag.artifacts.manifest import Item, Manifest
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core import took
from lora_dag.core.console import log, plural
from lora_dag.core.params import Config
from lora_dag.pictures.decode import preprocessing
from stages.cache_latents.context import Context, changes
from stages.cache_latents.entries import Captions, Effort, Masks, Views
from stages.cache_latents.environments import Origins
from stages.cache_latents.keys import Setting
from stages.cache_latents.notes import MadeOf, Notes, made_of

EMPTY = "(empty caption)"
AUGMENTATION = ("crop", "flip", "seed")
BUILD: dict[Kind, type[Views] | type[Captions]] = {"latents": Views, "text": Captions}


def show(context: Context, prepared: Path, latents: Path) -> None:
    if context.outdated:
        log.info("%s: prepare runs first; what follows is for %s as it is", context.outdated, prepared)
    notes = Notes.load(context.store)
    views = Views(context, notes.expected("latents", context.setting("latents")))
    captions = Captions(context, notes.expected("text", context.setting("text")))
    masks, origins = Masks(context), Origins()
    state = {work.kind: look(context.store, work.kind, work.jobs, origins) for work in (views, captions, masks)}
    edited = changes(context, context.manifest.items)

    reasons: dict[str, list[str]] = {}
    for item in sorted(context.manifest.items, key=lambda item: item.file_name):
        found = on_disk(item, edited) or explain(item, notes, views, captions, masks, state)
        if found:
            reasons[item.file_name] = found
    if captions.keys[""] in state["text"]:
        reasons[EMPTY] = setting_changes(notes, "text", captions.setting) or [state["text"][captions.keys[""]]]
    for name, found in reasons.items():
        log.info("%s: %s", name, ", ".join(found))
    num_bad = len(reasons.keys() - {EMPTY})
    log.info(
        "%s: %d valid, %d not",
        plural(len(context.manifest.items), "picture"),
        len(context.manifest.items) - num_bad,
        num_bad,
    )
    if edited:
        log.info("prepare must run first: python -m stages.prepare, or dvc repro")
    if not reasons and not (latents / "manifest.json").exists():
        log.info("%s is not there; a run puts it together again from the store", latents)
    for line in (*fallbacks(views, captions), *origins.warnings(context.store)):
        log.warning("warning: %s", line)
    log_cost(views, captions, state, edited, notes)
    source = Path(context.manifest.source)
    if edited or has_newer(source, prepared / "manifest.jsonl"):
        log.info("%s: edits there since prepare ran, of captions too, show after prepare", source)


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


def fallbacks(*works: Views | Captions) -> list[str]:
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
    item: Item, notes: Notes, views: Views, captions: Captions, masks: Masks, state: dict[Kind, dict[str, str]]
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
    then = notes.items.get(item.file_name)
    if then is None:
        return ["new"]
    now = made_of(context, item)
    found: list[str] = []
    if bad["latents"]:
        found += view_changes(then, now) + preprocessing_changes(item, context, notes)
        found += setting_changes(notes, "latents", views.setting)
    if bad["masks"]:
        found += mask_changes(then, now, context, notes)
    if bad["text"]:
        found += ["caption changed"] if then.captions != now.captions else []
        found += setting_changes(notes, "text", captions.setting)
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


def preprocessing_changes(item: Item, context: Context, notes: Notes) -> list[str]:
    now = context.manifest.preprocessing
    differ = [name for name, value in now.items() if notes.preprocessing.get(name) != value]
    if not item.transparent and "background" in differ:  # no part of its keys
        differ.remove("background")
    return [f"preprocessing changed ({', '.join(differ)})"] if differ else []


def mask_changes(then: MadeOf, now: MadeOf, context: Context, notes: Notes) -> list[str]:
    if then.mask != now.mask:
        return ["mask changed"]
    before, after = notes.unmasked_weight, context.manifest.unmasked_weight
    return [f"unmasked_weight {before} -> {after}"] if before != after else []


def setting_changes(notes: Notes, kind: Kind, setting: Setting) -> list[str]:
    """Such as ``another VAE`` and ``dtype float32 -> bfloat16``."""
    before = notes.used.get(kind)
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


# What prepare would do


def made_otherwise(manifest: Manifest, prepared: Path, config: Config) -> str:
    """What data/prepared records of how it was made and the parameters have otherwise by now, in one line, or nothing.

    Section ``dataset`` is no parameter of this stage: nothing here decides a result.
    """
    dataset = config.sections["dataset"].model_dump()
    asked = preprocessing(dataset["background"], dataset["image_interpolation_mode"])
    pairs: dict[str, tuple[Any, Any]] = {"dataset.source": (Path(manifest.source), Path(dataset["source"]))}
    pairs["dataset.resolution"] = (sizes(manifest, dataset), dataset["resolution"])
    pairs |= {f"dataset.{name}": (getattr(manifest.augmentation, name), dataset[name]) for name in AUGMENTATION}
    pairs |= {f"preprocessing {name}": (manifest.preprocessing.get(name), value) for name, value in asked.items()}
    pairs["dataset.unmasked_weight"] = (manifest.unmasked_weight, dataset["unmasked_weight"])
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if not differ:
        return ""
    before = ", ".join(f"{name} {said(then)}" for name, (then, _) in differ.items())
    return (
        f"{prepared} was made with {before}; {config.source} says {', '.join(said(now) for _, now in differ.values())}"
    )


def sizes(manifest: Manifest, dataset: dict[str, Any]) -> int | str:
    """``dataset.resolution`` if every picture has a size that it gives, else the first size that it does not give."""
    side, step = dataset["resolution"], dataset["bucket_step"]

    def is_given(width: int, height: int) -> bool:
        if not dataset["aspect_buckets"]:
            return width == height == side
        largest = max(width * height + step * width, width * height + step * height) > side**2 >= width * height
        return largest and width % step == height % step == 0

    other = sorted({(item.width, item.height) for item in manifest.items if not is_given(item.width, item.height)})
    if not other:
        return side
    width, height = other[0]
    return width if width == height else f"{width}x{height}"


def said(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def has_newer(source: Path, made: Path) -> bool:
    """Whether any file of the dataset was written after ``made``: captions stand in files that have no digest."""
    since = made.stat().st_mtime_ns
    paths = source.rglob("*") if source.is_dir() else [source]
    return any(path.is_file() and path.stat().st_mtime_ns > since for path in paths)


# What a run would cost


def log_cost(
    views: Views, captions: Captions, state: dict[Kind, dict[str, str]], edited: dict[str, str | None], notes: Notes
) -> None:
    device = views.context.device.type
    again = {key for name, reason in edited.items() if not reason for key in views.keys.get(name, ())}
    counts = {"latents": {*state["latents"], *again}, "text": set(state["text"])}
    if not any(counts.values()):
        log.info("a run would encode nothing")
        return
    what = f"{plural(len(counts['latents']), 'view')} and {plural(len(counts['text']), 'caption')}"
    seconds = size_bytes = 0.0
    for work in (views, captions):
        keys, effort = counts[work.kind], notes.effort(views.context, work.kind)
        if keys and not effort:
            log.info("a run would encode %s; their time on %s has not been measured yet", what, device)
            return
        if keys and effort:
            seconds += duration(work, keys, effort)
            size_bytes += sum(map(work.units, keys)) / effort.units * effort.bytes
    log.info("a run would encode %s: about %.0f s on %s, %.1f MB", what, seconds, device, size_bytes / 1e6)


def announce(context: Context) -> None:
    """What a run is about to take, by the last one with this base, dtype, processor and thread count."""
    notes, seconds = Notes.load(context.store), 0.0
    for kind, build in BUILD.items():
        if effort := notes.effort(context, kind):
            work = build(context, notes.expected(kind, context.setting(kind)))
            missing = {key for key in work.jobs if not context.store.path(kind, key).exists()}
            seconds += duration(work, missing, effort)
    took.announce(seconds)


def duration(work: Views | Captions, keys: set[str], effort: Effort) -> float:
    """Seconds for these: what was measured, the encoder's part per pixel of a view, the readers' per source pixel."""
    encoding = (effort.seconds - effort.reading_seconds) * sum(map(work.units, keys)) / effort.units
    if not effort.source_units:
        return encoding
    return encoding + effort.reading_seconds * sum(map(work.source_units, keys)) / effort.source_units
