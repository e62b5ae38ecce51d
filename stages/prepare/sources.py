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
from stages.prepare import mask_files, split_names, variants
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
from stages.prepare.scope import Scope

UNFINISHED = "unfinished-import.txt"
"""A file in the folder that `lora-dag import` is still writing."""
HUB_DATASET = re.compile(r"(?:https://huggingface\.co/datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@.+)?")


def list_entries(dataset: DatasetParams) -> Listing:
    """Every picture of every subset, in the order of the sources.

    Raises:
        UserError: a source is none, is empty or contradicts the parameters, or two subsets list one picture. Problems
            with single pictures and rows are in the listing; with on_bad error they stand in the UserError too.
    """
    scopes: list[Scope] = []
    refused: list[str] = []
    for index, subset in enumerate(dataset.as_subsets()):
        try:
            scope = open_subset(dataset, subset, index)
            scopes.append(scope)
            read_folder(scope)
        except UserError as error:
            refused += error.problems
    entries = [entry for scope in scopes for entry in scope.entries]
    problems = [problem for scope in scopes for problem in scope.problems]
    refused += overlaps(scopes)
    if refused:
        raise UserError(*refused, *(lines(problems) if dataset.on_bad == "error" else ()))
    names = [scope.below_it(name) for scope in scopes for name in scope.names]
    entries, without_split = split_names.assign(entries, names, dataset)
    problems += without_split
    unlisted = [name for scope in scopes for name in scope.unlisted]
    warnings = [text for scope in scopes for text in scope.warnings] + variants.warnings(entries, dataset)
    return Listing(entries, problems, unlisted, warnings)


def overlaps(scopes: list[Scope]) -> list[str]:
    """One line for each two subsets that list a picture twice."""
    first: dict[str, Scope] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for scope in scopes:
        for entry in scope.entries:
            other = first.setdefault(folded(entry.file_name), scope)
            if other is not scope:
                shared.setdefault((other.subset.path, scope.subset.path), []).append(entry.file_name)
    return [
        f"params.yaml dataset.subsets: '{one}' and '{two}' both list {plural(len(names), 'picture')}, such as"
        f" '{names[0]}'; choose paths that do not overlap, and use repeats to show pictures more often"
        for (one, two), names in shared.items()
    ]


# From a path to what stands there


def open_subset(dataset: DatasetParams, subset: Subset, index: int) -> Scope:
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
    return Scope(dataset, subset, index, root, path)


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


def read_folder(scope: Scope) -> None:
    if scope.mask_folder:
        if not PurePosixPath(scope.mask_folder).parts:
            raise UserError(
                f"params.yaml dataset.mask: '{scope.mask_folder}' is the folder of the pictures themselves; name a"
                " folder below it that holds the masks alone"
            )
        try:
            checked_name(scope.mask_folder, scope.root)
        except UserError as error:
            raise UserError(*(f"params.yaml dataset.mask: {problem}" for problem in error.problems)) from None
    tree = scan(scope.root, scope.below, scope.mask_folder)
    masks = mask_files.take_out(tree, scope.mask_folder)
    if tree.metadata and (tree.pictures or not tree.to_import):
        read_metadata(scope, tree)
    elif tree.to_import:
        raise UserError(
            f"{scope.place}: {short(tree.to_import[0])} is not read by the stages; {import_first(scope.place)}"
        )
    elif tree.pictures:
        read_loose(scope, tree)
    else:
        raise UserError(nothing_there(scope, tree))
    if not (scope.entries or scope.problems):
        raise UserError(f"{scope.place}: no pictures; the dataset is empty")
    warn_of_others(scope, tree)
    mask_files.attach(scope, masks)


def nothing_there(scope: Scope, tree: Tree) -> str:
    counts = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in [*tree.texts, *tree.others])
    there = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())[:5]) or "nothing"
    return f"{scope.place}: no pictures and no metadata.jsonl; the dataset is empty (found {there})"


def warn_of_others(scope: Scope, tree: Tree) -> None:
    """Files that may be pictures under a suffix that is nobody's, such as a camera's own; or captions under another."""
    told = {problem.file_name for problem in scope.problems if problem.file_name}
    beside = {name for names in files_beside(tree.pictures, tree.others).values() for name in names}
    used = told.union(scope.names)
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
        found = [scope.below_it(name) for name in others if name in names and not name.endswith(".json")]
        shown = ", ".join(map(printable, found[:NUM_EXAMPLES])) + (", ..." if len(found) > NUM_EXAMPLES else "")
        scope.warn_about(len(found), *(text.format(place=scope.place, shown=shown) for text in (one, many)))
