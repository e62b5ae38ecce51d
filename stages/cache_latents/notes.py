"""<state>/store/last.json: what the last run asked for, what it used and what it took. Nothing here decides a result.

It says why an entry is not valid any more, how long encoding takes here, and which batch size fitted into memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.artifacts.manifest import Item
from stages.artifacts.store import Kind, Store
from stages.cache_latents.context import Context
from stages.cache_latents.entries import Captions, Effort, Views
from stages.cache_latents.keys import Setting
from stages.core.files import write_json


@dataclass
class Notes:
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> the setting that params.yaml asked for."""
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> the setting that fitted into memory."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    unmasked_weight: float = 0.0
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File name -> what its entries were made of."""
    efforts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Device -> kind -> the last measured effort."""

    @classmethod
    def load(cls, store: Store) -> Notes:
        """Empty ones where there are none, or where they were written by another version."""
        try:
            return cls(**json.loads((store.root / "last.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def setting(self, kind: Kind, asked: Setting) -> Setting:
        """What the last run fell back to, if it asked for the same; else what is asked for."""
        same = self.asked.get(kind) == asdict(asked)
        return Setting(**self.used[kind]) if same and kind in self.used else asked

    def effort(self, device: str, kind: Kind) -> Effort | None:
        found = self.efforts.get(device, {}).get(kind)
        return Effort(**found) if found else None


def remember(views: Views, captions: Captions, before: Notes) -> None:
    """Write down what this run did."""
    context = views.context
    notes = Notes(
        asked={work.kind: asdict(context.setting(work.kind)) for work in (views, captions)},
        used={work.kind: asdict(work.setting) for work in (views, captions)},
        preprocessing=context.manifest.preprocessing,
        unmasked_weight=context.manifest.unmasked_weight,
        items={item.file_name: ingredients(context, item) for item in context.manifest.items},
        efforts=before.efforts,
    )
    known = notes.efforts.setdefault(context.device.type, {})
    for work in (views, captions):
        if work.effort and (work.effort.num_batches > 1 or work.kind not in known):  # a single batch is mostly padding
            known[work.kind] = asdict(work.effort)
    write_json(context.store.root / "last.json", asdict(notes))


def ingredients(context: Context, item: Item) -> dict[str, Any]:
    """What the entries of one picture are made of, beside the settings."""
    return {
        "picture": item.sha256,
        "size": [item.width, item.height],
        "views": [[*view.crop, view.flip] for view in context.views(item)],
        "captions": sorted({item.caption, *context.captions(item)}),
        "mask": [item.mask == "alpha", item.mask_sha256] if item.mask else None,
    }
