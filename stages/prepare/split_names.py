"""The named split that a source puts a picture in.

In this order: a ``split`` column; a folder of the name that is a split word of the ``datasets`` library or
dataset.heldout_split; and where dataset.heldout_split is no such word but a first folder, the first folder.

Names stay as they are written, save that words which ``datasets`` takes for one split (val, valid, validation, dev) are
one here too: a picture in ``val/`` gets the name ``validation`` if that is what dataset.heldout_split says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_dag.core.console import UserError
from stages.prepare.listing import Entry, Problem
from stages.prepare.names import nfc
from stages.prepare.params import DatasetParams

SYNONYMS = (
    {"train", "training"},
    {"validation", "valid", "val", "dev"},
    {"test", "testing", "eval", "evaluation"},
)
WORDS = frozenset().union(*SYNONYMS)


def from_column(value: Any, heldout_split: str | None) -> str | None:
    """The split in a ``split`` column.

    Raises:
        UserError: it is no name, and a named split is held out.
    """
    if isinstance(value, str) and value:
        return nfc(value)
    if heldout_split is None or value is None or value == "":
        return None
    raise UserError(f"split: got {value!r}; expected the name of a split, such as '{heldout_split}'")


def assign(entries: Sequence[Entry], names: Sequence[str], dataset: DatasetParams) -> tuple[list[Entry], list[Problem]]:
    """Entries with their splits, and one problem for each that has none where a named split is held out.

    Args:
        names: of the entries, relative to their subset.

    Raises:
        UserError: no entry is in dataset.heldout_split.
    """
    heldout = dataset.heldout_split
    firsts = [first_folder(name) or first_folder(entry.file_name) for entry, name in zip(entries, names, strict=True)]
    by_first = heldout not in WORDS and heldout is not None and heldout in firsts
    named = [
        replace(
            entry,
            split=as_heldout(entry.split or from_name(entry.file_name, heldout, first if by_first else None), heldout),
        )
        for entry, first in zip(entries, firsts, strict=True)
    ]
    if heldout is None:
        return named, []
    return named_only(named, heldout, dataset)


def named_only(entries: list[Entry], heldout: str, dataset: DatasetParams) -> tuple[list[Entry], list[Problem]]:
    found = sorted({entry.split for entry in entries if entry.split})
    if entries and heldout not in found:
        there = f"name one of {', '.join(found)}, or make it" if found else "make splits"
        raise UserError(
            f"params.yaml dataset.heldout_split: no picture is in split '{heldout}'; {there} by folders such as"
            " train and test, or a column 'split'"
        )
    regularization = {index for index, subset in enumerate(dataset.as_subsets()) if subset.regularization}
    usable, problems = [], []
    for entry in entries:
        if entry.split or entry.subset in regularization:  # those are trained on in any case
            usable.append(entry)
        else:
            text = f"'{entry.file_name}' is in no split, and dataset.heldout_split is '{heldout}'; put it into one"
            problems.append(Problem(entry.place, text, entry.file_name))
    return usable, problems


def first_folder(name: str) -> str | None:
    folder, slash, _ = nfc(name).partition("/")
    return folder if slash else None


def from_name(file_name: str, heldout: str | None, first: str | None) -> str | None:
    """The first folder of a file name that is a split's; else ``first``."""
    folders = nfc(file_name).split("/")[:-1]
    return next((folder for folder in folders if folder in WORDS or folder == heldout), first)


def as_heldout(split: str | None, heldout: str | None) -> str | None:
    """``heldout`` in place of a synonym of it."""
    same = any({split, heldout} <= words for words in SYNONYMS)
    return heldout if same else split
