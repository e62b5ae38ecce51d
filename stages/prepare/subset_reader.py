"""SubsetReader: collects the entries and problems of one subset; checks that all kinds of folders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from lora_dag.core.console import Problem, UserError, plural
from stages.prepare.file_names import Root
from stages.prepare.listing import Entry, RowProblem
from stages.prepare.params import DatasetParams, Subset

T = TypeVar("T")


@dataclass
class SubsetReader:
    """Entries, problems and warnings of one subset, for a Listing."""

    dataset: DatasetParams
    subset: Subset
    index: int
    root: Root
    relative_folder: str
    """The subset's folder, relative to the root. "" is the root."""
    entries: list[Entry] = field(default_factory=list)
    problems: list[RowProblem] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """File names of the entries."""
        return [entry.file_name for entry in self.entries]

    @property
    def place(self) -> str:
        return self.root.place(self.relative_folder)

    @property
    def column(self) -> str:
        return self.subset.caption_column or self.dataset.caption_column

    @property
    def mask_folder(self) -> str | None:
        return None if self.dataset.mask == "alpha" else self.dataset.mask

    def key(self, name: str) -> str:
        """Return the file and key that set the value of a setting of this subset."""
        is_own = self.dataset.subsets and getattr(self.dataset.subsets[self.index], name) is not None
        return self.dataset.setting(f"subsets.{self.index}.{name}" if is_own else name)

    def relative_name(self, name: str) -> str:
        """Return a name relative to the subset's folder, from one relative to the root."""
        return name.removeprefix(self.relative_folder + "/") if self.relative_folder else name

    def add(self, name: str, captions: tuple[str, ...], place: str, split: str | None = None) -> None:
        self.entries.append(Entry(name, captions, place, self.index, split))

    def warn_about(self, code: str, count: int, one: str, many: str) -> None:
        """Add a warning about ``count`` files unless it is 0.

        Args:
            one, many: text after the number, with its verb: ``file is ...`` and ``files are ...``.
        """
        if count:
            self.warnings.append(Problem(code, plural(count, one, many)))


def collect_errors(problems: list[Problem], function: Callable[[], T]) -> T | None:
    """Return the function's value, or None if it raises UserError, whose problems are then added to ``problems``."""
    try:
        return function()
    except UserError as error:
        problems += error.problems
        return None


def all_or_errors(function: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """Return the function's value for each name.

    Raises:
        UserError: the problems of all names.
    """
    values: list[T] = []
    problems: list[Problem] = []
    for name in names:
        try:
            values.append(function(name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return values


def instance_prompt(
    reader: SubsetReader, has_captions: bool, caption_files: str, missing: Problem
) -> tuple[str, ...] | None:
    """Return the instance prompt if it is the caption of every image, or None if each image has its own.

    Args:
        caption_files: files that may hold captions, for messages.
        missing: problem to raise if there are neither captions nor a prompt.

    Raises:
        UserError: both are given, or neither.
    """
    prompt = reader.subset.instance_prompt
    if prompt is None and not has_captions:
        raise UserError(missing)
    if prompt is not None and has_captions:
        raise UserError(
            Problem(
                "prompt-and-captions",
                f"{reader.key('instance_prompt')}: '{prompt}' would replace the captions in {caption_files}. Set it to"
                " null, or set it in dataset.subsets only for the folder without captions.",
            )
        )
    return None if prompt is None else (prompt,)


def missing_column(reader: SubsetReader, columns: list[str], place: str) -> Problem:
    others = sorted(set(columns) - {"file_name"})
    names = f"one of {', '.join(others)}" if len(others) > 1 else "".join(others)
    fix = f"Name {names}." if others else "Add the captions, since it has only file_name."
    return Problem(
        "column-missing", f"{reader.key('caption_column')}: '{reader.column}' is no column of {place}. {fix}"
    )
