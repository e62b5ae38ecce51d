"""Files of a format, written without the stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_dag.formats import Export, load_format

if TYPE_CHECKING:
    from lora_dag.adapters.adapter_tensors import AdapterTensors
    from lora_dag.families.protocol import Family


def write(
    kind: str,
    folder: Path,
    family: Family,
    parts: dict[str, AdapterTensors],
    header: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write ``ink-icons`` in a format of an adapter; its file."""
    nothing: Any = None  # what only reading back needs
    export = Export("ink-icons", nothing, family, nothing, nothing, {}, parts, dict(header), nothing)
    load_format(kind).write(export, folder)
    return folder / load_format(kind).FILE.format(name=export.name)
