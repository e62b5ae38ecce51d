"""reports/dataset/images.csv: every image of the dataset, including excluded ones. Git keeps its versions.

Rows are sorted by file name, so that a diff of two versions shows each change of the dataset.
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
    "width",  # of the original image, in pixels; empty if it is left out
    "height",
    "bucket",  # size for the model, such as 64x64
    "repeats",
    "captions",  # the canonical caption
    "num_captions",  # captions that training draws from
    "captions_digest",  # first digits of the SHA-256 of all captions, if there are several
    "sha256",
    "near_duplicates",  # first image of its group of near-duplicates
    "reason",  # reason of an excluded image
)
LEFT_OUT = "left out"
MAX_CUT = 0.34  # fraction of the area above which prepare and report warn: a square shows two thirds of 3:2
MAX_FIELD = 2**30  # bytes; csv's default of 128 KB is too short


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in any order; missing columns are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["file_name"], row["split"], row.get("reason", ""))))
    write_text(path, text.getvalue())


def parse(text: str) -> list[Row]:
    """Return the rows of a table of any version; missing columns are empty.

    Raises:
        ValueError: the text is no such table.
    """
    before = csv.field_size_limit(MAX_FIELD)  # a setting of the whole process
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
    """Return the factor by which an image is scaled to cover ``size`` (width, height); below 1 it shrinks."""
    return max(size[0] / width, size[1] / height)


def cropped_fraction(width: int, height: int, size: tuple[int, int]) -> float:
    """Return the fraction of an image's area that is outside of a view of ``size``, 0 to 1."""
    scale = enlargement(width, height, size)
    return 1 - size[0] * size[1] / (scale**2 * width * height)


def load(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return parse(file.read())
