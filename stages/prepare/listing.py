"""Listing: the images that a source names, as entries, and the problems with single images and rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from lora_dag.artifacts.manifest import natural_key
from lora_dag.core.console import Problem, UserError, plural

if TYPE_CHECKING:
    from stages.prepare.params import DatasetParams

MAX_LINES = 100  # printed problems of one file or folder


@dataclass(frozen=True)
class Entry:
    """An image that a source names."""

    file_name: str
    """Name relative to dataset.source, as ``Item.file_name``."""
    captions: tuple[str, ...]
    """Captions as written, without the prefix. At least one: ``("",)`` without a caption."""
    place: str
    """Place of the image in messages, such as ``data/raw/metadata.jsonl:3``."""
    subset: int = 0
    """Index into ``DatasetParams.as_subsets()``."""
    split: str | None = None
    """Name of its split in the source."""
    mask: str | None = None
    """File name of its mask, where dataset.mask is a folder or an ending."""


@dataclass(frozen=True)
class RowProblem:
    """A problem with one image or row, which can be left out."""

    code: str
    """Identity of the problem, as ``Problem.code``."""
    text: str
    """Message without its place: found, expected, fix."""
    place: str
    """Table and row, or image, such as ``data/raw/metadata.jsonl:3``."""
    file_name: str | None = None
    """Name of the image, if it is known and usable."""

    @property
    def problem(self) -> Problem:
        """Problem with its place."""
        return Problem(self.code, self.text).at(self.place)

    def __str__(self) -> str:
        return self.problem

    @property
    def file(self) -> str:
        """Table of a row, or folder of a loose image."""
        table, _, row = self.place.rpartition(":")
        return table if table and row.isdecimal() else str(PurePosixPath(self.place).parent)


def row_problems(problems: Iterable[Problem], place: str, file_name: str | None = None) -> list[RowProblem]:
    """Return problems of one row or image with its place."""
    return [RowProblem(problem.code, problem, place, file_name) for problem in problems]


@dataclass(frozen=True)
class Listing:
    entries: list[Entry]
    problems: list[RowProblem] = field(default_factory=list)
    """In the order of the source."""
    unlisted: list[str] = field(default_factory=list)
    """File names of images that no row names."""
    warnings: list[Problem] = field(default_factory=list)


def leave_out_bad(problems: list[RowProblem], entries: Sequence[Entry], dataset: DatasetParams) -> dict[str, str]:
    """Return the images to leave out, file name -> reason, if ``dataset.on_bad`` allows it.

    Raises:
        UserError: every problem, one line each, if on_bad is error or more than max_bad_fraction are bad.
    """
    problems = sorted(problems, key=lambda problem: natural_key(problem.place))
    if not problems:
        return {}
    if dataset.on_bad == "error":
        raise UserError(*first_problems(problems))
    left_out = reasons(problems)
    total = len({entry.file_name for entry in entries} | left_out.keys())
    if len(left_out) > dataset.max_bad_fraction * total:
        be = "is" if len(left_out) == 1 else "are"
        text = (
            f"{dataset.setting('max_bad_fraction')}: {len(left_out)} of {total} images {be} bad, more than the limit"
            f" {dataset.max_bad_fraction}. Correct them, or raise the limit."
        )
        raise UserError(*first_problems(problems), Problem("too-many-bad", text))
    return left_out


def first_problems(problems: Iterable[RowProblem]) -> list[Problem]:
    """Return the problems to print: the first MAX_LINES of each file or folder, and the number of further ones."""
    by_file: dict[str, list[RowProblem]] = {}
    for problem in problems:
        by_file.setdefault(problem.file, []).append(problem)
    printed: list[Problem] = []
    for file, of_file in by_file.items():
        printed += [problem.problem for problem in of_file[:MAX_LINES]]
        if len(of_file) > MAX_LINES:
            rest = plural(len(of_file) - MAX_LINES, "more problem")
            printed.append(Problem("more-problems", f"{file}: {rest} not listed here."))
    return printed


def reasons(problems: Iterable[RowProblem]) -> dict[str, str]:
    """Return image, or place where no image is known -> all of its problems in one text."""
    by_image: dict[str, dict[str, list[str]]] = {}
    for problem in problems:
        places = by_image.setdefault(problem.file_name or problem.place, {})
        places.setdefault(problem.place, []).append(str(problem.text))
    return {
        name: " ".join(f"{place}: {' '.join(texts)}" for place, texts in places.items())
        for name, places in by_image.items()
    }
