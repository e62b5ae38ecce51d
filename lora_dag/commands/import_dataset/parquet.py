"""Parquet files with the bytes of images: rows -> samples.

``datasets`` says which columns hold images; the rows are read by pyarrow, a few at a time. For 2,000 JPEG images in one
row group (429 MB) that took 0.4 GB and 4 s, and ``load_dataset(..., streaming=True)`` 1.6 GB and 29 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_dag.commands.import_dataset.samples import Columns, Sample
from lora_dag.core.console import UserError
from stages.prepare import captions
from stages.prepare.listing import Problem

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_ROWS = 16
BUFFER_BYTES = 2**20
MAX_SHOWN = 200
"""Characters of a list of columns in a message."""


@dataclass(frozen=True)
class ParquetShard:
    path: Path
    place: str
    split: str
    """Of rows without text in a column ``split``."""
    image: str
    """Column of the images."""
    caption: str | None
    mask: str | None
    has_split: bool
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def samples(self) -> Iterator[Sample | Problem]:
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
                        yield Problem(place, str(error))
                    number += 1

    def sample(self, row: dict[str, Any], number: int, place: str) -> Sample:
        blob, name = bytes_of(row[self.image])
        if blob is None:
            raise UserError(f"column '{self.image}' has no bytes of an image; embed them or remove the row")
        mask = bytes_of(row[self.mask])[0] if self.mask else None
        if self.mask and mask is None:
            raise UserError(f"column '{self.mask}' has no bytes of a mask; embed them or remove the row")
        found = captions.from_value(row, self.caption) if self.caption else None
        split = row.get("split") or self.split
        return Sample(place, name, blob, found, split, f"{PurePosixPath(self.place).stem}-{number:06}", mask)


def open_parquet(path: Path, place: str, split: str, columns: Columns) -> ParquetShard:
    """A Parquet file whose columns were checked.

    Raises:
        UserError: it is damaged or no Parquet file, or lacks a column.
    """
    from datasets import Features, Value

    with reading(path, place) as file:
        num_rows = file.metadata.num_rows
        features = Features.from_arrow_schema(file.schema_arrow)
    there = ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())[:MAX_SHOWN]
    images = [name for name, feature in features.items() if holds_images(feature)]
    if columns.mask is not None and columns.mask not in images:
        raise UserError(f"{place}: --mask-column '{columns.mask}' is no column of bytes of images; it has {there}")
    mask = columns.mask or ("mask" if "mask" in images else None)
    image = image_column([name for name in images if name != mask], columns.image, place, there)
    if columns.caption is not None and columns.caption not in features:
        raise UserError(
            f"{place}: no column '{columns.caption}'; it has {there}; choose the column of the captions with"
            " --caption-column, or import without captions: --no-captions"
        )
    has_split = features.get("split") in (Value("string"), Value("large_string"))
    return ParquetShard(path, place, split, image, columns.caption, mask, has_split, num_rows)


@contextmanager
def reading(path: Path, place: str) -> Iterator[pq.ParquetFile]:
    """Inside, a Parquet file is open.

    Raises:
        UserError: it is damaged, or no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except UnicodeDecodeError:  # Parquet does not promise that its strings are UTF-8
        raise UserError(f"{place}: not UTF-8 text; write the file again with text as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the machine's fault, not the file's
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place}: no Parquet file, or a damaged one ({reason}); restore it") from None


def holds_images(feature: Any) -> bool:
    """An image as ``datasets`` has it, a struct with bytes, or bytes alone."""
    from datasets import Image, Value

    binary = (Value("binary"), Value("large_binary"))
    return (
        isinstance(feature, Image)
        or feature in binary
        or (isinstance(feature, dict) and feature.get("bytes") in binary)
    )


def kind(feature: Any) -> str:
    """As a message names what a column holds."""
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()


def image_column(images: list[str], chosen: str | None, place: str, there: str) -> str:
    """The column that was chosen, else ``image``, else the only one that holds images.

    Raises:
        UserError: there is none, or none can be preferred.
    """
    if chosen is not None and chosen not in images:
        raise UserError(f"{place}: --image-column '{chosen}' is no column of bytes of images; it has {there}")
    if chosen is None and not images:
        raise UserError(f"{place}: no column of embedded images, such as 'image' with bytes; it has {there}")
    if chosen is None and len(images) > 1 and "image" not in images:
        raise UserError(f"{place}: images in the columns {', '.join(images)}; choose one with --image-column")
    return chosen or ("image" if "image" in images else images[0])


def bytes_of(value: Any) -> tuple[bytes | None, str | None]:
    """An image's bytes and the name that the row gives it; None for what it has not."""
    if isinstance(value, dict):
        return value["bytes"] or None, value.get("path") or None
    return value or None, None
