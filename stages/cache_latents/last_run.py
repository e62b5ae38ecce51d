"""<state>/store/last.json: what the last run asked for and what it used. It decides no result.

``lora-dag status`` says from it why an entry is not valid any more, and if memory was short.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import log
from lora_dag.core.files import write_json
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context
from stages.cache_latents.keys import Setting
from stages.cache_latents.latents import LatentEncoder


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
class LastRun:
    asked: dict[Kind, Setting] = field(default_factory=dict)
    """As params.yaml asked for it."""
    used: dict[Kind, Setting] = field(default_factory=dict)
    """As it fitted into memory."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    unmasked_weight: float = 0.0
    items: dict[str, MadeOf] = field(default_factory=dict)
    """By file name."""

    @classmethod
    def load(cls, store: Store) -> LastRun:
        """An empty one where there is none, or where another version wrote what cannot be understood."""
        try:
            return TypeAdapter(cls).validate_json((store.root / "last.json").read_bytes())
        except (OSError, ValueError):
            return cls()

    def expected(self, kind: Kind, asked: Setting) -> Setting:
        """What a run will use, as far as the last one tells: where it fell back from the same setting, so will the
        next one.
        """
        return self.used.get(kind, asked) if self.asked.get(kind) == asked else asked


def remember(views: LatentEncoder, captions: CaptionEncoder) -> None:
    """Write down what this run did."""
    context = views.context
    last = LastRun(
        asked={work.kind: context.setting(work.kind) for work in (views, captions)},
        used={work.kind: work.setting for work in (views, captions)},
        preprocessing=context.manifest.preprocessing,
        unmasked_weight=context.manifest.unmasked_weight,
        items={item.file_name: made_of(context, item) for item in context.manifest.items},
    )
    path = context.store.root / "last.json"
    try:
        write_json(path, asdict(last))
    except OSError as error:  # data/latents is whole without it
        log.warning("warning: %s: %s; `lora-dag status` will not know what this run did", path, error.strerror)


def made_of(context: Context, item: Item) -> MadeOf:
    return MadeOf(
        picture=item.sha256,
        size=[item.width, item.height],
        views=[[*view.crop, int(view.flip)] for view in context.views(item)],
        captions=sorted({item.caption, *context.captions(item)}),
        mask=(item.mask == "alpha", item.mask_sha256) if item.mask else None,
    )
