"""Parquet files with the bytes of images: from rows to samples.

``datasets`` finds the columns of images, and pyarrow reads a few rows at a time. For 2,000 JPEG images in one row group
(429 MB) this took 0.4 GB and 4 s, and ``load_dataset(..., streaming=True)`` took 1.6 GB and 29 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_dag.commands.import_dataset.samples import Columns, Sample
from lora_dag.core.console import Problem, UserError
from stages.prepare import captions
from stages.prepare.listing import RowProblem, row_problems

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_ROWS = 16
BUFFER_BYTES = 2**20
MAX_COLUMNS = 8
"""Columns in a message."""


@dataclass(frozen=True)
class ParquetShard:
    path: Path
    place: str
    split: str
    """Split of rows without text in a column ``split``."""
    image: str
    """Column of images."""
    caption: str | None
    mask: str | None
    has_split: bool
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def samples(self) -> Iterator[Sample | RowProblem]:
        names = [self.image, self.caption, self.mask, "split" if self.has_split else None]
        columns = [name for name in names if name]
        number = 0
        with reading(self.path, self.place) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    place = f"{self.place} row {number}"
                    try:
                        yield self.sample(row, number, place)
                    except UserError as error:
                        yield from row_problems(error.problems, place)
                    number += 1

    def sample(self, row: dict[str, Any], number: int, place: str) -> Sample:
        blob, name = bytes_of(row[self.image])
        if blob is None:
            raise UserError(no_bytes(self.image))
        mask = bytes_of(row[self.mask])[0] if self.mask else None
        if self.mask and mask is None:
            raise UserError(no_bytes(self.mask))
        texts = captions.from_value(row, self.caption) if self.caption else None
        split = row.get("split") or self.split
        return Sample(place, name, blob, texts, split, f"{PurePosixPath(self.place).stem}-{number:06}", mask)


def no_bytes(column: str) -> Problem:
    return Problem("image-not-embedded", f"column '{column}' has no bytes of an image. Embed them or remove the row.")


def open_parquet(path: Path, place: str, split: str, columns: Columns) -> ParquetShard:
    """Return a Parquet file after checking its columns.

    Raises:
        UserError: the file is damaged, is no Parquet file, or lacks a column.
    """
    from datasets import Features, Value

    with reading(path, place) as file:
        num_rows = file.metadata.num_rows
        features = Features.from_arrow_schema(file.schema_arrow)
    columns_found = f"The file has {listed_columns(features)}."
    images = [name for name, feature in features.items() if holds_images(feature)]
    if columns.mask is not None and columns.mask not in images:
        text = f"{place}: --mask-column '{columns.mask}' is no column of embedded images. {columns_found}"
        raise UserError(Problem("column-missing", text))
    mask = columns.mask or ("mask" if "mask" in images else None)
    image = image_column([name for name in images if name != mask], columns.image, place, columns_found)
    if columns.caption is not None and columns.caption not in features:
        text = (
            f"{place}: column '{columns.caption}' of captions is missing. {columns_found}"
            " Choose one with --caption-column, or use --no-captions."
        )
        raise UserError(Problem("column-missing", text))
    has_split = features.get("split") in (Value("string"), Value("large_string"))
    return ParquetShard(path, place, split, image, columns.caption, mask, has_split, num_rows)


@contextmanager
def reading(path: Path, place: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file inside ``with``.

    Raises:
        UserError: the file is damaged, or is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except UnicodeDecodeError:  # strings of Parquet need not be UTF-8
        text = f"{place}: the file has text that is not UTF-8. Write the file again with UTF-8."
        raise UserError(Problem("not-utf8", text)) from None
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the machine's fault, not the file's
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{place}: the file is damaged or is no Parquet file ({reason.rstrip('.')}). Restore it."
        raise UserError(Problem("shard-damaged", text)) from None


def holds_images(feature: Any) -> bool:
    """Return whether a column holds images: the type of ``datasets``, a struct with bytes, or bytes."""
    from datasets import Image, Value

    binary = (Value("binary"), Value("large_binary"))
    return (
        isinstance(feature, Image)
        or feature in binary
        or (isinstance(feature, dict) and feature.get("bytes") in binary)
    )


def listed_columns(features: dict[str, Any]) -> str:
    """Return names and types of columns for a message."""
    names = [f"{name} ({type_name(feature)})" for name, feature in features.items()]
    more = f" and {len(names) - MAX_COLUMNS} more columns" if len(names) > MAX_COLUMNS else ""
    return ", ".join(names[:MAX_COLUMNS]) + more


def type_name(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()


def image_column(images: list[str], chosen: str | None, place: str, columns_found: str) -> str:
    """Return the chosen column of images, else ``image``, else the only one.

    Args:
        columns_found: sentence that lists the columns of the file.

    Raises:
        UserError: there is no column of images, or there are several and none was chosen.
    """
    if chosen is not None and chosen not in images:
        text = f"{place}: --image-column '{chosen}' is no column of embedded images. {columns_found}"
        raise UserError(Problem("column-missing", text))
    if chosen is None and not images:
        text = f"{place}: a column of embedded images is missing, such as 'image' with bytes. {columns_found}"
        raise UserError(Problem("column-missing", text))
    if chosen is None and len(images) > 1 and "image" not in images:
        text = f"{place}: the columns {', '.join(images)} hold images. Choose one with --image-column."
        raise UserError(Problem("column-ambiguous", text))
    return chosen or ("image" if "image" in images else images[0])


def bytes_of(value: Any) -> tuple[bytes | None, str | None]:
    """Return an image's bytes and its name in the row. Either is None if it is missing."""
    if isinstance(value, dict):
        return value["bytes"] or None, value.get("path") or None
    return value or None, None
