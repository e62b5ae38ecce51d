"""dataset.source -> every picture that it names, with captions, split and mask, and everything wrong with the names.

No picture is opened, so the preflight can afford it. What a subset's path may be:

- a folder with metadata.jsonl, metadata.csv or metadata.parquet, also in folders below, as ``datasets`` reads them:
  ``file_name`` is relative to the metadata file; the caption column holds a string or a list of strings;
- a folder with ``name.txt`` or ``name.caption`` beside ``name.png`` (``loose.py``); each line that is not blank is one
  caption, of which training draws one per step;
- a folder of pictures alone, with ``instance_prompt``, as for DreamBooth;
- a .parquet or .tar (WebDataset) file, or a folder of them and no loose pictures (``shards.py``);
- a YAML file that pins a dataset of the Hugging Face Hub (``core/hub.py``), whose snapshot then is any of these.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from lora_dag.bases import hub
from lora_dag.core.console import UserError, plural
from lora_dag.pictures.containers import SEPARATOR, kind_of
from stages.prepare import mask_files, split_names, variants
from stages.prepare.listing import Listing, lines
from stages.prepare.loose import files_beside, read_loose
from stages.prepare.metadata import read_metadata
from stages.prepare.names import (
    NUM_EXAMPLES,
    Root,
    Tree,
    checked_file,
    checked_name,
    folded,
    is_companion,
    printable,
    scan,
    short,
)
from stages.prepare.params import DatasetParams, Subset
from stages.prepare.scope import Scope
from stages.prepare.shards import read_shards


def list_entries(dataset: DatasetParams, fetch: bool = True) -> Listing:
    """Every picture of every subset, in the order of the sources.

    Args:
        fetch: download what a pin names; else one that was not downloaded yet has no entries, and a warning says so.

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
            read_subset(scope, fetch)
        except UserError as error:
            refused += error.problems
    entries = [entry for scope in scopes for entry in scope.entries]
    problems = [problem for scope in scopes for problem in scope.problems]
    refused += overlaps(scopes)
    if refused:
        raise UserError(*refused, *(lines(problems) if dataset.on_bad == "error" else ()))
    is_whole = all(scope.is_fetched for scope in scopes)
    if is_whole:
        names = [scope.below_it(name) for scope in scopes for name in scope.names]
        entries, without_split = split_names.assign(entries, names, dataset)
        problems += without_split
    unlisted = [name for scope in scopes for name in scope.unlisted]
    warnings = [text for scope in scopes for text in scope.warnings] + variants.warnings(entries, dataset)
    return Listing(entries, problems, unlisted, warnings, is_whole)


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
    """Where a subset stands.

    Raises:
        UserError: nothing is there, or it is outside of dataset.source.
    """
    source = Path(dataset.source)
    if not source.exists():
        raise UserError(missing_source(dataset.source))
    if not source.is_dir():
        if subset.path != ".":
            raise UserError(f"params.yaml dataset.subsets: '{subset.path}' cannot be below {source}, which is a file")
        if SEPARATOR in source.name:
            raise UserError(
                f"params.yaml dataset.source: '{short(source.name)}' holds '{SEPARATOR}', which stands between a file"
                " and what it holds; rename the file"
            )
        return Scope(dataset, subset, index, Root(source.parent, label(source.parent)), source.name)
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
    """A folder or file below the root."""
    name = root.on_disk(checked_name(path, root))
    if not (root.folder / name).exists():
        raise UserError(f"'{name}' is neither folder nor file in {root.place('')}; add it or correct the path")
    if not (root.folder / name).is_dir():
        return checked_file(name, root)
    if not root.holds(root.folder / name / "x"):  # any name in it
        raise UserError(f"'{name}' is a link that leaves {root.place('')}; put the pictures themselves there")
    return name


def missing_source(source: str) -> str:
    text = (
        f"params.yaml dataset.source: '{source}' is no folder; "
        "`dvc pull` brings tracked data, or name a folder of your own"
    )
    named = re.fullmatch(rf"(?:https://huggingface\.co/datasets/)?({hub.NAME})(?:@(.+))?", source)
    if not named or (named[2] is None and Path(source).parent.is_dir()):
        return text
    commit = named[2] if re.fullmatch(hub.COMMIT, named[2] or "") else "the commit's 40 hex digits"
    return (
        f"params.yaml dataset.source: '{source}' is no folder; if it is a dataset of the Hugging Face Hub, write a file"
        f" such as data/pin.yaml with the lines `hub: {named[1]}`, `revision: {commit}` and, for a part of it,"
        ' `files: ["data/train-*.parquet"]`, and name that file: DVC and git then see when it changes'
    )


def read_subset(scope: Scope, fetch: bool) -> None:
    """Fill a scope from the folder or file that it stands for."""
    path = scope.root.folder / scope.below
    if path.is_dir():
        return read_folder(scope)
    kind = kind_of(path.name)
    if kind is None or not path.is_file():
        raise UserError(
            f"{scope.place}: expected a folder, a .parquet or .tar file, or a .yaml file that pins a Hub dataset"
        )
    if kind == "pin":
        return read_pinned(scope, fetch)
    return read_shards(scope, [scope.below])


def read_pinned(scope: Scope, fetch: bool) -> None:
    pin = scope.below
    path = scope.root.folder / pin
    if not fetch and not hub.is_fetched(hub.read_pin(path)):
        scope.warnings.append(f"{scope.place}: not fetched yet; `python -m stages.prepare` downloads and checks it")
        scope.is_fetched = False
        return
    snapshot = hub.fetch(path, verify=fetch)
    scope.root = Root(snapshot, f"{scope.place}::", f"{pin}::")
    scope.below = ""
    read_folder(scope)


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
    if tree.metadata and (tree.pictures or not tree.containers):
        read_metadata(scope, tree)
    elif tree.containers and not (tree.pictures or tree.metadata):
        read_shards(scope, tree.containers)
    elif tree.containers:
        loose = [*tree.metadata, *tree.pictures][0]
        raise UserError(
            f"{scope.place}: holds containers ({tree.containers[0]}) and loose files ({loose}); put them in separate"
            " folders and name both in dataset.subsets, or choose with `files` in the pin of a Hub dataset"
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
    return (
        f"{scope.place}: no pictures, no metadata.jsonl and no .parquet or .tar files; the dataset is empty (found"
        f" {there})"
    )


def warn_of_others(scope: Scope, tree: Tree) -> None:
    """Files that may be pictures under a suffix that is nobody's, such as a camera's own; or captions under another."""
    told = {(problem.file_name or "").removeprefix(scope.root.prefix) for problem in scope.problems}
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
