"""The views of a manifest's images, and the keys of their entries in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_dag.artifacts.manifest import Item, View, natural_key
from stages.cache_latents.context import Context


@dataclass(frozen=True)
class ViewJob:
    """A view and the image that it is cut from."""

    item: Item
    view: View


def plan_views(
    context: Context, key_of: Callable[[Item, View], str | None]
) -> tuple[dict[str, tuple[str, ...]], dict[str, ViewJob]]:
    """Return file name -> key of each view, and key -> view, in the order in which files are read.

    Args:
        key_of: the key of a view; None for a view without an entry.
    """
    keys: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, ViewJob] = {}
    for item in sorted(context.manifest.items, key=lambda item: natural_key(item.file_name)):
        pairs = [(key_of(item, view), view) for view in context.views(item)]
        keyed = [(key, view) for key, view in pairs if key is not None]
        keys[item.file_name] = tuple(key for key, _ in keyed)
        for key, view in keyed:
            jobs.setdefault(key, ViewJob(item, view))
    return keys, jobs
