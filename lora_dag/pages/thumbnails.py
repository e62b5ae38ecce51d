"""Thumbnails of pictures that a dataset holds or once held, by content, and a sheet of what changed in it.

<state>/store/thumbnails/<2 hex>/<sha256>.jpg   written by prepare; an older version's pictures are shown from here
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from lora_dag.core.files import state_dir
from lora_dag.pages.dataset_changes import Changes, Row
from lora_dag.pages.sheets import sheet

SIDE = 64  # pixels, of the longer side
QUALITY = 85  # about 2 KB each
COLUMNS, MAX_ROWS = 8, 2  # of the sheet, for each kind of change
CELL = 80
MISSING = "#eaeef2"
SHEET_MAX_BYTES = 200_000

Cell = tuple[str, str]
"""sha256 of a picture, and what stands below it."""


def path_of(sha256: str) -> Path:
    return state_dir() / "store" / "thumbnails" / sha256[:2] / f"{sha256}.jpg"


def size_of(width: int, height: int) -> tuple[int, int]:
    """A picture's size as a thumbnail; no picture is enlarged."""
    scale = min(1.0, SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def save(sha256: str, image: Image.Image) -> None:
    """Whole or not at all, but not synced: one that is lost to a power cut is made again."""
    path = path_of(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    image.save(temporary, format="JPEG", quality=QUALITY)
    temporary.replace(path)


def find(sha256: str) -> Image.Image | None:
    """None where there is none; a damaged one is removed, so that prepare makes it again."""
    path = path_of(sha256)
    if not sha256 or not path.exists():
        return None
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        path.unlink(missing_ok=True)
        return None


def changes_sheet(changes: Changes) -> Image.Image | None:
    """Rows of what was edited (before and now), added, removed and recaptioned; None where no thumbnail is kept."""
    rows, labels, captions = [], [], list[list[str | None]]()
    num_found = 0
    for label, cells in shown(changes):
        for start in range(0, len(cells), COLUMNS):
            part = cells[start : start + COLUMNS]
            found = [find(sha256) for sha256, _ in part]
            num_found += sum(image is not None for image in found)
            padding = COLUMNS - len(part)
            rows.append([*(image or Image.new("RGB", (CELL, CELL), MISSING) for image in found), *[None] * padding])
            captions.append([*(caption for _, caption in part), *[None] * padding])
            labels.append(label)
    if not num_found:
        return None
    return sheet(rows, labels, None, CELL, captions=captions)


def shown(changes: Changes) -> Iterator[tuple[str, list[Cell]]]:
    """The first pictures of each kind of change."""
    edited = [cell for old, new in changes.edited for cell in (named(old, "before"), named(new, "now"))]
    for label, cells in (
        ("edited", edited),
        ("added", [named(row) for row in changes.added]),
        ("removed", [named(row) for row in changes.removed]),
        ("recaptioned", [(new["sha256"], new["captions"]) for _, new in changes.recaptioned]),
        ("taken back", [named(row) for row in changes.taken_back]),
    ):
        if cells:
            yield label, cells[: COLUMNS * MAX_ROWS]


def named(row: Row, when: str = "") -> Cell:
    name = row["file_name"].rpartition("/")[2]
    return row["sha256"], f"{when} {name}".strip()
