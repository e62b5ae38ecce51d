"""What a source says before any picture is opened: entries, and problems with the place that they stand at."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """A picture that a source names."""

    file_name: str
    """As in ``Item.file_name``."""
    captions: tuple[str, ...]
    """As written, at least one, without the prefix; ``("",)`` for none."""
    place: str
    """Where a problem with it is reported, such as ``data/raw/metadata.jsonl:3``."""
    subset: int = 0
    """Index into ``DatasetParams.as_subsets()``."""
    split: str | None = None
    """Name of the split that the source puts it in."""
    mask: str | None = None
    """File name of its mask, where dataset.mask is a folder."""


@dataclass(frozen=True)
class Problem:
    """One picture or row that cannot be used."""

    place: str
    text: str
    """What we got, what we accept, what to do."""
    file_name: str | None = None
    """The picture, where its name is known and usable."""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Listing:
    entries: list[Entry]
    problems: list[Problem] = field(default_factory=list)
    """In the order of the source."""
    unlisted: list[str] = field(default_factory=list)
    """Pictures that no row names, by file name."""
    warnings: list[str] = field(default_factory=list)
    """What is allowed but seldom meant, one line each."""
