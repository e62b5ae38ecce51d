"""dataset.source -> every picture that it names, with captions, split and mask, and everything wrong with the names.

No picture is opened, so the preflight can afford it. What a subset's path may be:

- a folder with metadata.jsonl or metadata.csv, also in folders below, as ``datasets`` reads them: ``file_name`` is
  relative to the metadata file; the caption column holds a string or a list of strings;
- a folder with ``name.txt`` or ``name.caption`` beside ``name.png`` (``loose.py``); each line that is not blank is one
  caption, of which training draws one per step;
- a folder of pictures alone, with ``instance_prompt``, as for DreamBooth.

Parquet, WebDataset (.tar) and the Hugging Face Hub are unpacked into such a folder by `lora-dag import`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from lora_dag.core.console import UserError, plural
from stages.prepare import caption_variants, mask_files, split_names
from stages.prepare.listing import Listing, lines
from stages.prepare.loose import files_beside, read_loose
from stages.prepare.metadata import read_metadata
from stages.prepare.names import (
    NUM_EXAMPLES,
    TO_IMPORT,
    Root,
    Tree,
    checked_name,
    folded,
    is_companion,
    printable,
    scan,
    short,
)
from stages.prepare.params import DatasetParams, Subset
from stages.prepare.subset_reader import SubsetReader

UNFINISHED = "unfinished-import.txt"
"""A file in the folder that `lora-dag import` is still writing."""
HUB_DATASET = re.compile(r"(?:https://huggingface\.co/datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@.+)?")


def list_entries(dataset: DatasetParams) -> Listing:
    """Every picture of every subset, in the order of the sources.

    Raises:
        UserError: a source is none, is empty or contradicts the parameters, or two subsets list one picture. Problems
            with single pictures and rows are in the listing; with on_bad error they stand in the UserError too.
    """
    readers: list[SubsetReader] = []
    refused: list[str] = []
    for index, subset in enumerate(dataset.as_subsets()):
        try:
            reader = open_subset(dataset, subset, index)
            readers.append(reader)
            read_folder(reader)
        except UserError as error:
            refused += error.problems
    entries = [entry for reader in readers for entry in reader.entries]
    problems = [problem for reader in readers for problem in reader.problems]
    refused += overlaps(readers)
    if refused:
        raise UserError(*refused, *(lines(problems) if dataset.on_bad == "error" else ()))
    names = [reader.relative_name(name) for reader in readers for name in reader.names]
    entries, without_split = split_names.assign(entries, names, dataset)
    problems += without_split
    unlisted = [name for reader in readers for name in reader.unlisted]
    warnings = [text for reader in readers for text in reader.warnings] + caption_variants.warnings(entries, dataset)
    return Listing(entries, problems, unlisted, warnings)


def overlaps(readers: list[SubsetReader]) -> list[str]:
    """One line for each two subsets that list a picture twice."""
    first: dict[str, SubsetReader] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for reader in readers:
        for entry in reader.entries:
            other = first.setdefault(folded(entry.file_name), reader)
            if other is not reader:
                shared.setdefault((other.subset.path, reader.subset.path), []).append(entry.file_name)
    return [
        f"params.yaml dataset.subsets: '{one}' and '{two}' both list {plural(len(names), 'picture')}, such as"
        f" '{names[0]}'; choose paths that do not overlap, and use repeats to show pictures more often"
        for (one, two), names in shared.items()
    ]


# From a path to what stands there


def open_subset(dataset: DatasetParams, subset: Subset, index: int) -> SubsetReader:
    """Where a subset's pictures are.

    Raises:
        UserError: there is no such folder, it is outside of dataset.source, or an import into it did not finish.
    """
    source = Path(dataset.source)
    if not source.is_dir():
        raise UserError(missing_source(dataset.source))
    if any((folder / UNFINISHED).exists() for folder in (source, source.parent)):
        raise UserError(
            f"params.yaml dataset.source: '{source}' is an import that did not finish; run the same `lora-dag import`"
            " again, which goes on, and name the folder that it makes"
        )
    root = Root(source, label(source))
    path = "" if PurePosixPath(subset.path) == PurePosixPath(".") else subset.path
    if path:
        try:
            path = checked_path(path, root)
        except UserError as error:
            raise UserError(*(f"params.yaml dataset.subsets: path {problem}" for problem in error.problems)) from None
    return SubsetReader(dataset, subset, index, root, path)


def label(folder: Path) -> str:
    return "" if folder == Path(".") else f"{folder.as_posix().rstrip('/')}/"


def checked_path(path: str, root: Root) -> str:
    """A folder below the root."""
    name = root.on_disk(checked_name(path, root))
    if not (root.folder / name).exists():
        raise UserError(f"'{name}' is not in {root.place('')}; add it or correct the path")
    if not (root.folder / name).is_dir():
        cure = import_first(root.place(name)) if TO_IMPORT.fullmatch(name) else "expected a folder"
        raise UserError(f"'{name}' is a file; {cure}")
    if not root.holds(root.folder / name / "x"):  # any name in it
        raise UserError(f"'{name}' is a link that leaves {root.place('')}; put the pictures themselves there")
    return name


def missing_source(text: str) -> str:
    """What to say of a dataset.source that is no folder."""
    source = Path(text)
    place = f"params.yaml dataset.source: '{text}'"
    named = HUB_DATASET.fullmatch(text)
    if source.is_file() and TO_IMPORT.fullmatch(source.name):
        return f"{place} is a file of many pictures; {import_first(source)}"
    if source.is_file():
        pinned = "; of a Hub dataset, " + import_first("OWNER/NAME@COMMIT")
        return f"{place} is a file; name a folder{pinned if source.suffix in ('.yaml', '.yml') else ''}"
    if named and (named[2] or not source.parent.is_dir()):
        cure = import_first(named[1] + (named[2] or ""))
        return f"{place} is no folder; if it is a dataset of the Hugging Face Hub, {cure}"
    return f"{place} is no folder; `dvc pull` brings tracked data, or name a folder of your own"


def import_first(source: Path | str) -> str:
    return f"unpack it once: `lora-dag import {source} data/mine`, and set dataset.source=data/mine"


def read_folder(reader: SubsetReader) -> None:
    if reader.mask_folder:
        if not PurePosixPath(reader.mask_folder).parts:
            raise UserError(
                f"params.yaml dataset.mask: '{reader.mask_folder}' is the folder of the pictures themselves; name a"
                " folder below it that holds the masks alone"
            )
        try:
            checked_name(reader.mask_folder, reader.root)
        except UserError as error:
            raise UserError(*(f"params.yaml dataset.mask: {problem}" for problem in error.problems)) from None
    tree = scan(reader.root, reader.below, reader.mask_folder)
    masks = mask_files.take_out(tree, reader.mask_folder)
    if tree.metadata and (tree.pictures or not tree.to_import):
        read_metadata(reader, tree)
    elif tree.to_import:
        raise UserError(
            f"{reader.place}: {short(tree.to_import[0])} is not read by the stages; {import_first(reader.place)}"
        )
    elif tree.pictures:
        read_loose(reader, tree)
    else:
        raise UserError(nothing_there(reader, tree))
    if not (reader.entries or reader.problems):
        raise UserError(f"{reader.place}: no pictures; the dataset is empty")
    warn_of_others(reader, tree)
    mask_files.attach(reader, masks)


def nothing_there(reader: SubsetReader, tree: Tree) -> str:
    counts = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in [*tree.texts, *tree.others])
    there = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())[:5]) or "nothing"
    return f"{reader.place}: no pictures and no metadata.jsonl; the dataset is empty (found {there})"


def warn_of_others(reader: SubsetReader, tree: Tree) -> None:
    """Files that may be pictures under a suffix that is nobody's, such as a camera's own; or captions under another."""
    told = {problem.file_name for problem in reader.problems if problem.file_name}
    beside = {name for names in files_beside(tree.pictures, tree.others).values() for name in names}
    used = told.union(reader.names)
    others = [name for name in tree.others if name not in used and not is_companion(name)]
    for names, one, many in (
        (
            beside,
            "file beside pictures of {place} is not read ({shown}); captions are read from .txt",
            "files beside pictures of {place} are not read ({shown}); captions are read from .txt",
        ),
        (
            set(others) - beside,
            "file in {place} is no picture by its suffix and is left out ({shown}); convert it if it is one",
            "files in {place} are no pictures by their suffix and are left out ({shown}); convert those that are",
        ),
    ):
        found = [reader.relative_name(name) for name in others if name in names and not name.endswith(".json")]
        shown = ", ".join(map(printable, found[:NUM_EXAMPLES])) + (", ..." if len(found) > NUM_EXAMPLES else "")
        reader.warn_about(len(found), *(text.format(place=reader.place, shown=shown) for text in (one, many)))
