"""What a source says of its pictures: entries, and problems with the place that they stand at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from lora_dag.artifacts.manifest import natural_key
from lora_dag.core.console import UserError, plural

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

MAX_LINES = 100  # about one file or folder


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

    @property
    def file(self) -> str:
        """The file whose row it is; of a loose picture, the folder."""
        table, _, row = self.place.rpartition(":")
        return table if table and row.isdecimal() else str(PurePosixPath(self.place).parent)


@dataclass(frozen=True)
class Listing:
    entries: list[Entry]
    problems: list[Problem] = field(default_factory=list)
    """In the order of the source."""
    unlisted: list[str] = field(default_factory=list)
    """Pictures that no row names, by file name."""
    warnings: list[str] = field(default_factory=list)
    """What is allowed but seldom meant, one line each."""


def leave_out_bad(problems: list[Problem], entries: Sequence[Entry], dataset: DatasetParams) -> dict[str, str]:
    """What is left out, file name -> reason, if ``dataset.on_bad`` allows it.

    Raises:
        UserError: every problem, one line each; or too many to go on without.
    """
    problems = sorted(problems, key=lambda problem: natural_key(problem.place))
    if not problems:
        return {}
    if dataset.on_bad == "error":
        raise UserError(*lines(problems))
    named = reasons(problems)
    total = len({entry.file_name for entry in entries} | named.keys())
    if len(named) > dataset.max_bad_fraction * total:
        limit = f"more than dataset.max_bad_fraction {dataset.max_bad_fraction}"
        found = f"{len(named)} of {total} pictures are bad, {limit}; mend them or raise it"
        raise UserError(*lines(problems), f"params.yaml dataset.on_bad: {found}")
    return named


def lines(problems: Iterable[Problem]) -> list[str]:
    """What is said of them: one line each, of one file or folder the first MAX_LINES."""
    by_file: dict[str, list[Problem]] = {}
    for problem in problems:
        by_file.setdefault(problem.file, []).append(problem)
    said: list[str] = []
    for file, found in by_file.items():
        said += map(str, found[:MAX_LINES])
        if len(found) > MAX_LINES:
            said.append(f"{file}: and {plural(len(found) - MAX_LINES, 'more problem')}")
    return said


def reasons(problems: Iterable[Problem]) -> dict[str, str]:
    """Picture, or place where none is known -> everything that is wrong with it."""
    found: dict[str, dict[str, list[str]]] = {}
    for problem in problems:
        found.setdefault(problem.file_name or problem.place, {}).setdefault(problem.place, []).append(problem.text)
    return {
        name: "; ".join(f"{place}: {'; '.join(texts)}" for place, texts in places.items())
        for name, places in found.items()
    }
