"""Samples of a file with many images: each image with its captions, its mask and the name of its split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from stages.prepare.listing import RowProblem


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a sample's parts."""

    image: str | None
    """None for the default: ``image``, or the only column of images."""
    caption: str | None
    """None to import no captions."""
    mask: str | None


@dataclass(frozen=True)
class Sample:
    place: str
    """Place in messages: file and row, or file and member."""
    name: str | None
    """File name of the image in the source."""
    image: bytes
    captions: tuple[str, ...] | None
    split: str
    number: str
    """Name by file and row, for images without a name: ``train-00000-of-00002-000017``."""
    mask: bytes | None = None


class Shard(Protocol):
    """A file of many samples."""

    def __len__(self) -> int:
        """Return the number of rows, or of groups of members."""

    def samples(self) -> Iterator[Sample | RowProblem]:
        """Yield samples and problems in the order of the file."""
