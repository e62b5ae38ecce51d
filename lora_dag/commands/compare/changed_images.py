"""A sheet of the images that were added, removed, edited or recaptioned between the datasets of two revisions.

No image is fetched. One of a commit is read from DVC's cache by the commit's dvc.lock; one of the workspace, or one
that is still the same, from dataset.source. An image that this machine has in neither place is a grey cell.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lora_dag.commands.compare.dataset_changes import Row, changes_between
from lora_dag.commands.compare.sides import DAMAGED, Side
from lora_dag.pages.sheets import sheet
from lora_dag.pictures.decode import to_rgb
from lora_dag.pictures.formats import FORMATS
from lora_dag.pipeline.dvc_files import parse_lock

COLUMNS, MAX_ROWS = 8, 2  # for each kind of change
SIDE = 64  # pixels, of an image's longer side
CELL = 80
MISSING = "#eaeef2"
MAX_BYTES = 200_000


class Cell(NamedTuple):
    side: Side
    row: Row
    """Of the side's pictures.csv."""
    caption: str


def changes_sheet(a: Side, b: Side) -> Image.Image | None:
    """Rows of what was edited (before and now), added, removed and recaptioned; None where no image is found."""
    read = {side.name: reader(side) for side in (a, b)}
    rows, labels, captions = [], [], list[list[str | None]]()
    num_found = 0
    for label, cells in shown(a, b):
        for start in range(0, len(cells), COLUMNS):
            part = cells[start : start + COLUMNS]
            found = [small(read[cell.side.name](cell.row)) for cell in part]
            num_found += sum(image is not None for image in found)
            padding = COLUMNS - len(part)
            rows.append([*(image or Image.new("RGB", (CELL, CELL), MISSING) for image in found), *[None] * padding])
            captions.append([*(cell.caption for cell in part), *[None] * padding])
            labels.append(label)
    return sheet(rows, labels, None, CELL, captions=captions) if num_found else None


def shown(a: Side, b: Side) -> Iterator[tuple[str, list[Cell]]]:
    """The first images of each kind of change."""
    changes = changes_between(a, b)
    edited = [cell for old, new in changes.edited for cell in (named(a, old, "before"), named(b, new, "now"))]
    for label, cells in (
        ("edited", edited),
        ("added", [named(b, row) for row in changes.added]),
        ("removed", [named(a, row) for row in changes.removed]),
        ("recaptioned", [Cell(b, new, new["captions"]) for _, new in changes.recaptioned]),
        ("taken back", [named(b, row) for row in changes.taken_back]),
    ):
        if cells:
            yield label, cells[: COLUMNS * MAX_ROWS]


def named(side: Side, row: Row, when: str = "") -> Cell:
    name = row["file_name"].rpartition("/")[2]
    return Cell(side, row, f"{when} {name}".strip())


def reader(side: Side) -> Callable[[Row], bytes | None]:
    """Reads the bytes of a row's image; None where this machine has them no more."""
    source = str(side.params.get("dataset.source", ""))
    cached = cached_files(side.lock, source) if side.commit is not None and side.lock is not None else {}

    def read(row: Row) -> bytes | None:
        name = row["file_name"]
        for path in (cached.get(name), Path(source, name)):
            if path is not None and path.is_file():
                blob = path.read_bytes()
                if hashlib.sha256(blob).hexdigest() == row["sha256"]:
                    return blob
        return None

    return read


def cached_files(lock: bytes, source: str) -> dict[str, Path]:
    """File name below dataset.source -> where DVC's cache keeps it; empty where nothing says."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with contextlib.suppress(*DAMAGED, DvcException, OSError):
        digest = parse_lock(lock)["prepare"].deps[source]["md5"]
        path_of: Callable[[str], Any] = Repo().cache.local.oid_to_path
        tree = json.loads(Path(path_of(digest)).read_bytes())
        return {row["relpath"]: Path(path_of(row["md5"])) for row in tree}
    return {}


def small(blob: bytes | None) -> Image.Image | None:
    """A thumbnail; None for bytes that are no image."""
    if blob is None:
        return None
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            whole = to_rgb(image, "#ffffff")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    whole.thumbnail((SIDE, SIDE))
    return whole
