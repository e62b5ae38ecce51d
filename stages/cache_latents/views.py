"""The views of a manifest's images, with the keys of what the store holds of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_dag.artifacts.manifest import Item, View, natural_key
from stages.cache_latents.context import Context


@dataclass(frozen=True)
class Job:
    """A view, and the picture that it is cut from."""

    item: Item
    view: View


def plan(
    context: Context, key_of: Callable[[Item, View], str | None]
) -> tuple[dict[str, tuple[str, ...]], dict[str, Job]]:
    """File name -> key of each view, and key -> what it shows, in the order to read files in."""
    keys: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, Job] = {}
    for item in sorted(context.manifest.items, key=lambda item: natural_key(item.file_name)):
        pairs = [(key_of(item, view), view) for view in context.views(item)]
        named = [(key, view) for key, view in pairs if key is not None]
        keys[item.file_name] = tuple(key for key, _ in named)
        for key, view in named:
            jobs.setdefault(key, Job(item, view))
    return keys, jobs
