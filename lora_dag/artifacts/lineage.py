"""reports/{validate,export}/lineage.json: provenance of the results, as a list of names and values.

It is a list, as DVC would show every value of an object as a column of its tables, and look for points of a plot in it
(DVC 3.67 warns about every empty list).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dag.core.files import from_json, read_json, write_json


def save(path: Path, made_from: Mapping[str, Any]) -> None:
    write_json(path, [[name, made_from[name]] for name in sorted(made_from)])


def load(path: Path) -> dict[str, Any]:
    """Return names and values.

    Raises:
        TypeError, ValueError: the file has other content.
        UserError: the file is invalid JSON.
    """
    return dict(read_json(path))


def parse(text: str | bytes) -> dict[str, Any]:
    """Return names and values of a text; also of an older version, which was an object.

    Raises:
        TypeError, ValueError: the text has other content.
    """
    return dict(from_json(text))
