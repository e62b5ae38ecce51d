"""Draw a sheet of the images that were added, removed, edited or recaptioned between two revisions.

No image is downloaded. An image of a commit is read from DVC's cache by the commit's dvc.lock; an image of the
workspace, or one with unchanged bytes, is read from dataset.source. Images that are in neither place are gray cells.
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
from lora_dag.commands.compare.revision_report import DAMAGED, RevisionReport
from lora_dag.images.decode import to_rgb
from lora_dag.images.file_formats import FORMATS
from lora_dag.pages.sheets import sheet
from lora_dag.pipeline.dvc_files import parse_lock

COLUMNS, MAX_ROWS = 8, 2  # for each kind of change
SIDE = 64  # pixels, of an image's longer side
CELL = 80
MISSING = "#eaeef2"
MAX_BYTES = 200_000


class Cell(NamedTuple):
    revision: RevisionReport
    row: Row
    """Row of the revision's images.csv."""
    caption: str


def changes_sheet(a: RevisionReport, b: RevisionReport) -> Image.Image | None:
    """Draw rows of edited (before and now), added, removed and recaptioned images; None if no image is here."""
    read = {revision.name: reader(revision) for revision in (a, b)}
    rows, labels, captions = [], [], list[list[str | None]]()
    num_found = 0
    for label, cells in changed_cells(a, b):
        for start in range(0, len(cells), COLUMNS):
            part = cells[start : start + COLUMNS]
            found = [thumbnail(read[cell.revision.name](cell.row)) for cell in part]
            num_found += sum(image is not None for image in found)
            padding = COLUMNS - len(part)
            rows.append([*(image or Image.new("RGB", (CELL, CELL), MISSING) for image in found), *[None] * padding])
            captions.append([*(cell.caption for cell in part), *[None] * padding])
            labels.append(label)
    return sheet(rows, labels, None, CELL, captions=captions) if num_found else None


def changed_cells(a: RevisionReport, b: RevisionReport) -> Iterator[tuple[str, list[Cell]]]:
    """Yield the first images of each kind of change."""
    changes = changes_between(a, b)
    edited = [cell for old, new in changes.edited for cell in (cell_of(a, old, "before"), cell_of(b, new, "now"))]
    for label, cells in (
        ("edited", edited),
        ("added", [cell_of(b, row) for row in changes.added]),
        ("removed", [cell_of(a, row) for row in changes.removed]),
        ("recaptioned", [Cell(b, new, new["captions"]) for _, new in changes.recaptioned]),
        ("restored", [cell_of(b, row) for row in changes.restored]),
    ):
        if cells:
            yield label, cells[: COLUMNS * MAX_ROWS]


def cell_of(revision: RevisionReport, row: Row, when: str = "") -> Cell:
    name = row["file_name"].rpartition("/")[2]
    return Cell(revision, row, f"{when} {name}".strip())


def reader(revision: RevisionReport) -> Callable[[Row], bytes | None]:
    """Return a function from a row to the bytes of its image; None if this machine does not have them."""
    source = str(revision.params.get("dataset.source", ""))
    cached = cached_files(revision.lock, source) if revision.commit is not None and revision.lock is not None else {}

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
    """Return file name below dataset.source -> path in DVC's cache; empty if DVC does not have the dataset."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with contextlib.suppress(*DAMAGED, DvcException, OSError):
        digest = parse_lock(lock)["prepare"].deps[source]["md5"]
        path_of: Callable[[str], Any] = Repo().cache.local.oid_to_path
        tree = json.loads(Path(path_of(digest)).read_bytes())
        return {row["relpath"]: Path(path_of(row["md5"])) for row in tree}
    return {}


def thumbnail(blob: bytes | None) -> Image.Image | None:
    """Return a thumbnail; None if the bytes are not an image."""
    if blob is None:
        return None
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            whole = to_rgb(image, "#ffffff")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    whole.thumbnail((SIDE, SIDE))
    return whole
