"""<state>/store/last.json: settings of the last run and inputs of its entries. It affects no result.

``lora-dag status`` reads it to explain why an entry is not valid any more, and whether memory was short.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import AliasChoices, Field, TypeAdapter

from lora_dag.artifacts.manifest import Item
from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import warn
from lora_dag.core.files import write_json
from stages.cache_latents.captions import CaptionEncoder
from stages.cache_latents.context import Context
from stages.cache_latents.keys import Setting
from stages.cache_latents.latents import LatentEncoder


@dataclass(frozen=True)
class ItemInputs:
    """Inputs of the entries of one image, besides the settings."""

    image: Annotated[str, Field(validation_alias=AliasChoices("image", "picture"))]
    """SHA-256 of the image. Its second alias is the name in files of older versions."""
    size: list[int]
    views: list[list[int]]
    """Left, top, right, bottom in pixels, and 1 for a mirrored view."""
    captions: list[str]
    mask: tuple[bool, str | None] | None
    """True for the image's own alpha channel, and the digest of the mask's file; None for no mask."""


@dataclass
class LastRun:
    """Settings and inputs of the last run."""

    asked: dict[Kind, Setting] = field(default_factory=dict)
    """Settings of params.yaml. The name is part of the file's format."""
    used: dict[Kind, Setting] = field(default_factory=dict)
    """Settings that fitted into memory."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    unmasked_weight: float = 0.0
    items: dict[str, ItemInputs] = field(default_factory=dict)
    """File name -> inputs of its entries."""

    @classmethod
    def load(cls, store: Store) -> LastRun:
        """Return the record of the last run; an empty one if there is none or another version wrote it."""
        try:
            return TypeAdapter(cls).validate_json((store.root / "last.json").read_bytes())
        except (OSError, ValueError):
            return cls()

    def expected_setting(self, kind: Kind, requested: Setting) -> Setting:
        """Return the setting that the next run will probably use: the smaller one if the last run had to fall back."""
        return self.used.get(kind, requested) if self.asked.get(kind) == requested else requested


def write_last_run(views: LatentEncoder, captions: CaptionEncoder) -> None:
    """Write the record of this run, or warn if the file cannot be written."""
    context = views.context
    last = LastRun(
        asked={work.kind: context.requested_setting(work.kind) for work in (views, captions)},
        used={work.kind: work.setting for work in (views, captions)},
        preprocessing=context.manifest.preprocessing,
        unmasked_weight=context.manifest.unmasked_weight,
        items={item.file_name: item_inputs(context, item) for item in context.manifest.items},
    )
    path = context.store.root / "last.json"
    try:
        write_json(path, asdict(last))
    except OSError as error:  # data/latents is complete without it
        warn("last-run-not-recorded", f"{path}: {error.strerror}. `lora-dag status` will not know about this run.")


def item_inputs(context: Context, item: Item) -> ItemInputs:
    return ItemInputs(
        image=item.sha256,
        size=[item.width, item.height],
        views=[[*view.crop, int(view.flip)] for view in context.views(item)],
        captions=sorted({item.caption, *context.captions(item)}),
        mask=(item.mask == "alpha", item.mask_sha256) if item.mask else None,
    )
