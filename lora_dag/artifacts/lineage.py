"""reports/{validate,export}/lineage.json: what the results were made from, as a list of names and values.

A list and no object, so that no table and no page of DVC's shows it: DVC makes a column of every value that an object
in a metric holds, and looks for a series of points in an object among the plots (3.67 warns of every empty list).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dag.core.files import from_json, read_json, write_json


def save(path: Path, made_from: Mapping[str, Any]) -> None:
    write_json(path, [[name, made_from[name]] for name in sorted(made_from)])


def load(path: Path) -> dict[str, Any]:
    """Names and values.

    Raises:
        TypeError, ValueError: it holds something else.
        UserError: it is no JSON.
    """
    return dict(read_json(path))


def parse(text: str | bytes) -> dict[str, Any]:
    """The same of a text; also of an older version, which was an object.

    Raises:
        TypeError, ValueError: it holds something else.
    """
    return dict(from_json(text))
