"""``python -m stages.cache_latents --status``: why entries are not valid, and what a run would cost. Writes nothing.

Reads every picture and every entry, so that its word can be relied on. The exit code is 0 whatever it finds, as that of
``git status`` and ``dvc status``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.artifacts.manifest import Item
from stages.artifacts.store import Kind, Store, read
from stages.cache_latents.context import Context, changes
from stages.cache_latents.entries import Captions, Masks, Views
from stages.cache_latents.keys import Setting
from stages.cache_latents.notes import Notes, ingredients
from stages.core.console import log

EMPTY = "(empty caption)"


def show(context: Context, latents: Path) -> None:
    notes = Notes.load(context.store)
    views = Views(context, notes.setting("latents", context.setting("latents")))
    captions = Captions(context, notes.setting("text", context.setting("text")))
    masks = Masks(context)
    state = {work.kind: look(context.store, work.kind, work.jobs) for work in (views, captions, masks)}
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
        "%d pictures: %d valid, %d not", len(context.manifest.items), len(context.manifest.items) - num_bad, num_bad
    )
    if edited:
        log.info("prepare must run first: python -m stages.prepare, or dvc repro")
    if not reasons and not (latents / "manifest.json").exists():
        log.info("%s is not there; a run puts it together again from the store", latents)
    log_cost(views, captions, state, edited, notes)


def look(store: Store, kind: Kind, keys: Any) -> dict[str, str]:
    """Entries that cannot be used: key -> why."""
    found = {}
    for key in keys:
        path = store.path(kind, key)
        if not path.exists():
            found[key] = "entry missing from the store"
        elif read(path) is None:
            found[key] = "entry damaged"
    return found


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
    now = ingredients(context, item)
    found: list[str] = []
    if bad["latents"]:
        found += view_changes(then, now, context, notes) + setting_changes(notes, "latents", views.setting)
    if bad["masks"]:
        found += mask_changes(then, now, context, notes)
    if bad["text"]:
        found += ["caption changed"] if then["captions"] != now["captions"] else []
        found += setting_changes(notes, "text", captions.setting)
    return list(dict.fromkeys(found or [*bad["latents"], *bad["text"], *bad["masks"]]))


def view_changes(then: dict[str, Any], now: dict[str, Any], context: Context, notes: Notes) -> list[str]:
    found = []
    if then["picture"] != now["picture"]:
        found.append("pixels changed")
    if then["size"] != now["size"]:
        found.append(f"size changed ({size(then)} -> {size(now)})")
    elif [view for view in then["views"] if view not in now["views"]] and "pixels changed" not in found:
        found.append("crop changed")
    if len(then["views"]) < len(now["views"]):
        found.append(f"variants {len(then['views'])} -> {len(now['views'])}")
    differ = [name for name, value in context.manifest.preprocessing.items() if notes.preprocessing.get(name) != value]
    return found + ([f"preprocessing changed ({', '.join(differ)})"] if differ else [])


def mask_changes(then: dict[str, Any], now: dict[str, Any], context: Context, notes: Notes) -> list[str]:
    if then["mask"] != now["mask"]:
        return ["mask changed"]
    before, after = notes.unmasked_weight, context.manifest.unmasked_weight
    return [f"unmasked_weight {before} -> {after}"] if before != after else []


def setting_changes(notes: Notes, kind: Kind, setting: Setting) -> list[str]:
    """Such as ``another VAE`` and ``dtype float32 -> bfloat16``."""
    if kind not in notes.used:
        return []
    before = Setting(**notes.used[kind])
    found = []
    if before.components != setting.components:
        found.append("another VAE" if kind == "latents" else "another text encoder")
    old, new = before.ingredients(), setting.ingredients()
    return found + [
        f"{name} {old.get(name, False)} -> {new.get(name, False)}".replace("True", "true").replace("False", "false")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def size(made_of: dict[str, Any]) -> str:
    return "x".join(map(str, made_of["size"]))


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
        effort = notes.effort(device, work.kind)
        units = sum(work.units(key) for key in counts[work.kind])
        if units and effort is None:
            log.info("a run would encode %s; their time on %s has not been measured yet", what, device)
            return
        if units and effort:
            seconds += units / effort.units * effort.seconds
            size_bytes += units / effort.units * effort.bytes
    log.info("a run would encode %s: about %.0f s on %s, %.1f MB", what, seconds, device, size_bytes / 1e6)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
