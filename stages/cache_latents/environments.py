"""What made the entries that a cache is assembled from. It can move their last bits and is part of no key; see keys.py.

A store that has seen several versions of torch mixes their bits. That is said, and the cure named: nothing is undone.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from lora_dag.artifacts.store import Kind, Store

DECIDING: dict[Kind, tuple[str, ...]] = {
    "latents": ("torch", "diffusers", "numpy", "pillow", "machine", "device", "num_threads"),
    "text": ("torch", "transformers", "machine", "device", "num_threads"),
    "masks": ("numpy", "pillow"),
}
"""Of ``device.environment``, what the bits of each kind can depend on."""
NOUNS: dict[Kind, str] = {"latents": "latents", "text": "captions", "masks": "masks"}
MAX_NAMED = 3


def made_by(kind: Kind, environment: Mapping[str, str | int]) -> str:
    """What an entry records."""
    return json.dumps({name: environment[name] for name in DECIDING[kind]}, sort_keys=True)


class Origins:
    """What made each entry; those that do not record it are left out."""

    def __init__(self) -> None:
        self.found: defaultdict[Kind, dict[str, str]] = defaultdict(dict)

    def add(self, kind: Kind, key: str, made_by: str) -> None:
        if made_by:
            self.found[kind][key] = made_by

    def warnings(self, store: Store) -> Iterator[str]:
        """A line for each kind whose entries come from several environments."""
        for kind, found in self.found.items():
            counts = Counter(found.values())
            if len(counts) > 1:
                yield (
                    f"{shown(kind, counts)}: the last bits may differ from those of a fresh run; "
                    f"delete {store.root / kind} to make them all anew"
                )


def shown(kind: Kind, counts: Counter[str]) -> str:
    """Such as ``9688 latents were made with torch 2.13.0, 312 with torch 2.12.1``: what differs, ranked."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    records = [json.loads(text) for text, _ in ranked]
    differ = [name for name in DECIDING[kind] if len({record.get(name) for record in records}) > 1]
    parts = [
        f"{count} {NOUNS[kind] + ' were made ' if index == 0 else ''}with "
        + " and ".join(f"{name} {record.get(name, 'unknown')}" for name in differ)
        for index, (record, (_, count)) in enumerate(zip(records, ranked, strict=True))
    ]
    return ", ".join(parts[:MAX_NAMED]) + (f" and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else "")
