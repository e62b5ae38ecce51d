"""What is read of one subset: its entries and problems so far, and what every kind of folder checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from lora_dag.core.console import UserError, plural
from stages.prepare.listing import Entry, Problem
from stages.prepare.names import Root
from stages.prepare.params import DatasetParams, Subset

T = TypeVar("T")


@dataclass
class SubsetReader:
    """Collects what one subset adds to a Listing."""

    dataset: DatasetParams
    subset: Subset
    index: int
    root: Root
    below: str
    """The subset's folder, relative to the root; "" is the root."""
    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the entries."""
        return [entry.file_name for entry in self.entries]

    @property
    def place(self) -> str:
        return self.root.place(self.below)

    @property
    def column(self) -> str:
        return self.subset.caption_column or self.dataset.caption_column

    @property
    def mask_folder(self) -> str | None:
        return None if self.dataset.mask == "alpha" else self.dataset.mask

    def key(self, name: str) -> str:
        """The key of params.yaml that sets the value of a setting."""
        own = self.dataset.subsets and getattr(self.dataset.subsets[self.index], name) is not None
        return f"params.yaml dataset.subsets.{self.index}.{name}" if own else f"params.yaml dataset.{name}"

    def relative_name(self, name: str) -> str:
        """A name relative to the root, as seen from the subset's folder."""
        return name.removeprefix(self.below + "/") if self.below else name

    def add(self, name: str, found: tuple[str, ...], place: str, split: str | None = None) -> None:
        self.entries.append(Entry(name, found, place, self.index, split))

    def warn_about(self, count: int, one: str, many: str) -> None:
        """Where there are any; both texts with their verb, ``file is`` and ``files are``."""
        if count:
            self.warnings.append(plural(count, one, many))


def collect_errors(problems: list[str], function: Callable[[], T]) -> T | None:
    """The function's value; None where it raises, with what it says added to ``problems``."""
    try:
        return function()
    except UserError as error:
        problems += error.problems
        return None


def all_or_errors(function: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """The function's value for each name.

    Raises:
        UserError: with the problems of all names.
    """
    values: list[T] = []
    problems: list[str] = []
    for name in names:
        try:
            values.append(function(name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return values


def instance_prompt(reader: SubsetReader, has_captions: bool, where: str, missing: str) -> tuple[str, ...] | None:
    """The instance prompt if it is every picture's caption; None if each has its own.

    Args:
        where: what may hold captions.
        missing: what to say where there are neither.

    Raises:
        UserError: there are both, or neither.
    """
    prompt = reader.subset.instance_prompt
    if prompt is None and not has_captions:
        raise UserError(missing)
    if prompt is not None and has_captions:
        raise UserError(
            f"{reader.key('instance_prompt')}: '{prompt}' would replace the captions in {where};"
            " set it to null, or in dataset.subsets for the folder without captions only"
        )
    return None if prompt is None else (prompt,)


def no_column(reader: SubsetReader, columns: list[str], place: str) -> str:
    found = sorted(set(columns) - {"file_name"})
    there = f"it has {', '.join(found)}" if found else "it has file_name only"
    return f"{reader.key('caption_column')}: '{reader.column}' is no column of {place}; {there}"
