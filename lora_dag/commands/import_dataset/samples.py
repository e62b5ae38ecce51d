"""What a file of a source holds: one image after the other with its captions, its mask and the name of its split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from stages.prepare.listing import Problem


@dataclass(frozen=True)
class Columns:
    """Where the parts of a sample are."""

    image: str | None
    """None for the only column of images."""
    caption: str | None
    """None where captions are not imported."""
    mask: str | None


@dataclass(frozen=True)
class Sample:
    place: str
    """As messages name it: file and row, or file and member."""
    name: str | None
    """File name that the source gives the image."""
    image: bytes
    captions: tuple[str, ...] | None
    split: str
    number: str
    """File and row, for images that have no name of their own: ``train-00000-of-00002-000017``."""
    mask: bytes | None = None


class Shard(Protocol):
    """A file of many samples."""

    def __len__(self) -> int:
        """Rows, or groups of members."""

    def samples(self) -> Iterator[Sample | Problem]:
        """In the order of the file."""
