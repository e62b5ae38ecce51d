"""reports/dataset/pictures.csv: every picture of the dataset, also those left out. Git keeps its versions.

Sorted by file name, so that a diff of two versions shows what was done to the dataset, line by line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from lora_dag.core.files import write_text

Row = dict[str, str]

COLUMNS = (
    "file_name",
    "split",  # train, heldout or left out
    "width",  # of the picture itself, in pixels; empty where it is left out
    "height",
    "bucket",  # what the model sees, such as 64x64
    "repeats",
    "captions",  # the canonical one
    "num_captions",  # that training draws from
    "captions_digest",  # of all of them, where there are several: first digits of their SHA-256
    "sha256",
    "near_duplicates",  # first picture of the group of near-duplicates that it belongs to
    "reason",  # why it is left out
)
LEFT_OUT = "left out"
MAX_CUT = 0.34  # of a picture's area, beyond which prepare and the report warn: a square shows two thirds of 3:2
MAX_FIELD = 2**30  # csv's own limit of 128 KB is a short text's


def save(path: Path, rows: Iterable[Row]) -> None:
    """Rows in any order; a column that a row lacks is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["file_name"], row["split"], row.get("reason", ""))))
    write_text(path, text.getvalue())


def parse(text: str) -> list[Row]:
    """Rows of a table of any version; a column that it lacks is empty.

    Raises:
        ValueError: no such table.
    """
    before = csv.field_size_limit(MAX_FIELD)  # of the whole process
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        found = [{name: row.get(name) or "" for name in COLUMNS} for row in reader]
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    if not {"file_name", "split"} <= set(reader.fieldnames or ()):
        raise ValueError("no columns file_name and split")
    return found


def enlargement(width: int, height: int, size: tuple[int, int]) -> float:
    """Factor by which a picture is scaled to cover ``size`` (width, height); below 1 it shrinks."""
    return max(size[0] / width, size[1] / height)


def cut_off(width: int, height: int, size: tuple[int, int]) -> float:
    """Share of a picture's area that no view of ``size`` shows at once, 0 to 1."""
    scale = enlargement(width, height, size)
    return 1 - size[0] * size[1] / (scale**2 * width * height)


def load(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return parse(file.read())
