"""<state>/store/last.json: what the last run asked for, what it used and what it took. It decides no result.

``--status`` says from it why an entry is not valid any more, how long encoding takes here, and if memory was short.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import log
from lora_dag.core.files import write_json
from stages.cache_latents.context import Context
from stages.cache_latents.entries import Captions, Effort, Views
from stages.cache_latents.keys import Setting


@dataclass(frozen=True)
class MadeOf:
    """What the entries of one picture are made of, beside the settings."""

    picture: str
    size: list[int]
    views: list[list[int]]
    """left, top, right, bottom, and whether it is mirrored"""
    captions: list[str]
    mask: tuple[bool, str | None] | None
    """Whether it is the picture's own transparency, and the digest of its file."""


@dataclass
class Notes:
    asked: dict[Kind, Setting] = field(default_factory=dict)
    """As params.yaml asked for it."""
    used: dict[Kind, Setting] = field(default_factory=dict)
    """As it fitted into memory."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    unmasked_weight: float = 0.0
    items: dict[str, MadeOf] = field(default_factory=dict)
    """By file name."""
    efforts: dict[str, dict[Kind, Effort]] = field(default_factory=dict)
    """``Context.speed`` -> kind -> the last measured effort."""

    @classmethod
    def load(cls, store: Store) -> Notes:
        """Empty ones where there are none, or where another version wrote what cannot be understood."""
        try:
            return TypeAdapter(cls).validate_json((store.root / "last.json").read_bytes())
        except (OSError, ValueError):
            return cls()

    def expected(self, kind: Kind, asked: Setting) -> Setting:
        """What a run will use, as far as the last one tells: where it fell back from the same setting, so will the
        next one.
        """
        return self.used.get(kind, asked) if self.asked.get(kind) == asked else asked

    def effort(self, context: Context, kind: Kind) -> Effort | None:
        found = self.efforts.get(context.speed(kind), {}).get(kind)
        return found if found and found.units else None


def remember(views: Views, captions: Captions) -> None:
    """Write down what this run did."""
    context = views.context
    before = Notes.load(context.store)
    notes = Notes(
        asked={work.kind: context.setting(work.kind) for work in (views, captions)},
        used={work.kind: work.setting for work in (views, captions)},
        preprocessing=context.manifest.preprocessing,
        unmasked_weight=context.manifest.unmasked_weight,
        items={item.file_name: made_of(context, item) for item in context.manifest.items},
        efforts=before.efforts,
    )
    for work in (views, captions):
        known = notes.efforts.setdefault(context.speed(work.kind), {})
        if work.effort and (work.effort.num_batches > 1 or work.kind not in known):  # a single batch is mostly padding
            known[work.kind] = work.effort
    path = context.store.root / "last.json"
    try:
        write_json(path, asdict(notes))
    except OSError as error:  # data/latents is whole without it
        log.warning("warning: %s: %s; --status will not know what this run did", path, error.strerror)


def made_of(context: Context, item: Item) -> MadeOf:
    return MadeOf(
        picture=item.sha256,
        size=[item.width, item.height],
        views=[[*view.crop, int(view.flip)] for view in context.views(item)],
        captions=sorted({item.caption, *context.captions(item)}),
        mask=(item.mask == "alpha", item.mask_sha256) if item.mask else None,
    )
