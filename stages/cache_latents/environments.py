"""Versions and machine that made each entry. They can change last bits and are no part of the keys; see keys.py.

A store that several versions of torch have filled mixes their results. The stage warns of the mix and leaves it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from lora_dag.artifacts.store import Kind, Store
from lora_dag.core.console import Problem

DECIDING: dict[Kind, tuple[str, ...]] = {
    "latents": ("torch", "diffusers", "numpy", "pillow", "machine", "device", "num_threads"),
    "text": ("torch", "transformers", "machine", "device", "num_threads"),
    "masks": ("numpy", "pillow"),
}
"""Kind -> the names in ``device.environment`` that its bits can depend on."""
NOUNS: dict[Kind, str] = {"latents": "latents", "text": "captions", "masks": "masks"}
MAX_LISTED = 3


def environment_json(kind: Kind, environment: Mapping[str, str | int]) -> str:
    """Return the record that an entry holds of the environment that made it."""
    return json.dumps({name: environment[name] for name in DECIDING[kind]}, sort_keys=True)


class EnvironmentMix:
    """Environments that made the entries of a cache; entries without such a record are ignored."""

    def __init__(self) -> None:
        self.records: defaultdict[Kind, dict[str, str]] = defaultdict(dict)

    def add(self, kind: Kind, key: str, made_by: str) -> None:
        if made_by:
            self.records[kind][key] = made_by

    def problems(self, store: Store) -> Iterator[Problem]:
        """Yield a warning for each kind whose entries come from several environments."""
        for kind, records in self.records.items():
            counts = Counter(records.values())
            if len(counts) > 1:
                yield Problem(
                    "mixed-environments",
                    f"{describe_environments(kind, counts)}, so last bits may differ from a fresh run. "
                    f"Delete {store.root / kind} to encode all of them again.",
                )


def describe_environments(kind: Kind, counts: Counter[str]) -> str:
    """Return such as ``9688 latents were made with torch 2.13.0, 312 with torch 2.12.1``, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    records = [json.loads(text) for text, _ in ranked]
    differ = [name for name in DECIDING[kind] if len({record.get(name) for record in records}) > 1]
    parts = [
        f"{count} {NOUNS[kind] + ' were made ' if index == 0 else ''}with "
        + " and ".join(f"{name} {record.get(name, 'unknown')}" for name in differ)
        for index, (record, (_, count)) in enumerate(zip(records, ranked, strict=True))
    ]
    return ", ".join(parts[:MAX_LISTED]) + (f" and {len(parts) - MAX_LISTED} more" if len(parts) > MAX_LISTED else "")
