"""Named splits: the name of the split of each image in a source.

The name is, in this order: the value of a ``split`` column; a folder in the file name that is a split word of the
``datasets`` library or dataset.heldout_split; the first folder, if dataset.heldout_split is a first folder.

Names are kept as written, except synonyms in ``datasets`` (val, valid, validation, dev): an image in ``val/`` gets the
name ``validation`` if dataset.heldout_split is ``validation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_dag.core.console import Problem, UserError
from lora_dag.core.labels import as_yaml
from stages.prepare.file_names import nfc
from stages.prepare.listing import Entry, RowProblem
from stages.prepare.params import DatasetParams

SYNONYMS = (
    {"train", "training"},
    {"validation", "valid", "val", "dev"},
    {"test", "testing", "eval", "evaluation"},
)
WORDS = frozenset().union(*SYNONYMS)


def from_column(value: Any, heldout_split: str | None) -> str | None:
    """Return the split in a ``split`` column, or None for an empty cell.

    Raises:
        UserError: the value is no name, and a named split is held out.
    """
    if isinstance(value, str) and value:
        return nfc(value)
    if heldout_split is None or value is None or value == "":
        return None
    text = f"split: got {as_yaml(value)}, but the name of a split is expected, such as '{heldout_split}'."
    raise UserError(Problem("split-invalid", text))


def name_splits(
    entries: Sequence[Entry], names: Sequence[str], dataset: DatasetParams
) -> tuple[list[Entry], list[RowProblem]]:
    """Return the entries with their splits, and a problem for each one without a split if a named split is held out.

    Args:
        names: file names of the entries, relative to their subset.

    Raises:
        UserError: no entry is in dataset.heldout_split.
    """
    heldout = dataset.heldout_split
    firsts = [first_folder(name) or first_folder(entry.file_name) for entry, name in zip(entries, names, strict=True)]
    by_first = heldout not in WORDS and heldout is not None and heldout in firsts
    with_split = [
        replace(
            entry,
            split=as_heldout(entry.split or from_name(entry.file_name, heldout, first if by_first else None), heldout),
        )
        for entry, first in zip(entries, firsts, strict=True)
    ]
    if heldout is None:
        return with_split, []
    return require_splits(with_split, heldout, dataset)


def require_splits(entries: list[Entry], heldout: str, dataset: DatasetParams) -> tuple[list[Entry], list[RowProblem]]:
    """Return the entries with a split, and a problem for each one without."""
    splits = sorted({entry.split for entry in entries if entry.split})
    if entries and heldout not in splits:
        how = "folders such as train and test, or a column 'split'"
        fix = f"Name one of {', '.join(splits)}, or make it by {how}." if splits else f"Make splits by {how}."
        text = f"{dataset.setting('heldout_split')}: no image is in split '{heldout}'. {fix}"
        raise UserError(Problem("split-missing", text))
    regularization = {index for index, subset in enumerate(dataset.as_subsets()) if subset.regularization}
    usable, problems = [], []
    for entry in entries:
        if entry.split or entry.subset in regularization:  # always trained on
            usable.append(entry)
        else:
            text = f"'{entry.file_name}' is in no split, but dataset.heldout_split is '{heldout}'. Put it into a split."
            problems.append(RowProblem("image-without-split", text, entry.place, entry.file_name))
    return usable, problems


def first_folder(name: str) -> str | None:
    folder, slash, _ = nfc(name).partition("/")
    return folder if slash else None


def from_name(file_name: str, heldout: str | None, first: str | None) -> str | None:
    """Return the first folder of a file name that names a split, else ``first``."""
    folders = nfc(file_name).split("/")[:-1]
    return next((folder for folder in folders if folder in WORDS or folder == heldout), first)


def as_heldout(split: str | None, heldout: str | None) -> str | None:
    """Return ``heldout`` for a synonym of it, and other splits unchanged."""
    is_synonym = any({split, heldout} <= words for words in SYNONYMS)
    return heldout if is_synonym else split
