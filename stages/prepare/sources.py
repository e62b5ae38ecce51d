"""Sources: list every image of dataset.source with captions, split and mask, and all problems with names.

No image is opened, so that the check before a run stays fast. The path of a subset is one of:

- a folder with metadata.jsonl or metadata.csv, also in folders below, as ``datasets`` reads them: ``file_name`` is
  relative to the metadata file; the caption column holds a string or a list of strings;
- a folder with ``name.txt`` or ``name.caption`` beside ``name.png`` (``loose_images.py``); each line is one caption
  (blank lines are skipped), and training draws one per step;
- a folder of images alone, with ``instance_prompt``, as for DreamBooth.

Parquet, WebDataset (.tar) and the Hugging Face Hub are unpacked into such a folder by `lora-dag import`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from lora_dag.core.console import Problem, UserError, plural
from stages.prepare import caption_variants, mask_files, split_names
from stages.prepare.file_names import Root, checked_name, examples, folded, short
from stages.prepare.file_tree import TO_IMPORT, Tree, is_companion, scan
from stages.prepare.listing import Listing, first_problems
from stages.prepare.loose_images import files_beside, read_loose
from stages.prepare.metadata import read_metadata
from stages.prepare.params import DatasetParams, Subset
from stages.prepare.subset_reader import SubsetReader

UNFINISHED = "unfinished-import.txt"
"""File in a folder whose import by `lora-dag import` has not finished."""
HUB_DATASET = re.compile(r"(?:https://huggingface\.co/datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@.+)?")


def list_entries(dataset: DatasetParams) -> Listing:
    """Return every image of every subset, in the order of the sources.

    Raises:
        UserError: a source is missing or empty or contradicts the settings, or two subsets list one image. Problems
            with single images and rows are in the listing, and with on_bad error also in the UserError.
    """
    readers: list[SubsetReader] = []
    refused: list[Problem] = []
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
        raise UserError(*refused, *(first_problems(problems) if dataset.on_bad == "error" else ()))
    names = [reader.relative_name(name) for reader in readers for name in reader.names]
    entries, without_split = split_names.name_splits(entries, names, dataset)
    problems += without_split
    unlisted = [name for reader in readers for name in reader.unlisted]
    warnings = [text for reader in readers for text in reader.warnings] + caption_variants.caption_warnings(
        entries, dataset
    )
    return Listing(entries, problems, unlisted, warnings)


def overlaps(readers: list[SubsetReader]) -> list[Problem]:
    """Return one problem for each pair of subsets that list the same image."""
    first: dict[str, SubsetReader] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for reader in readers:
        for entry in reader.entries:
            other = first.setdefault(folded(entry.file_name), reader)
            if other is not reader:
                shared.setdefault((other.subset.path, reader.subset.path), []).append(entry.file_name)
    return [
        Problem(
            "subsets-overlap",
            f"{readers[0].dataset.setting('subsets')}: '{one}' and '{two}' both list {plural(len(names), 'image')},"
            f" such as '{names[0]}'. Choose paths that do not overlap. To use images more often, set repeats.",
        )
        for (one, two), names in shared.items()
    ]


# From a path to its folder


def open_subset(dataset: DatasetParams, subset: Subset, index: int) -> SubsetReader:
    """Return the reader of a subset's folder.

    Raises:
        UserError: the folder is missing, is outside of dataset.source, or holds an unfinished import.
    """
    source = Path(dataset.source)
    if not source.is_dir():
        raise UserError(missing_source(dataset.source).at(dataset.setting("source")))
    if any((folder / UNFINISHED).exists() for folder in (source, source.parent)):
        text = (
            f"{dataset.setting('source')}: '{source}' is an unfinished import. Run the same `lora-dag import` again to"
            " finish it, then name the folder that it writes."
        )
        raise UserError(Problem("import-unfinished", text))
    root = Root(source, label(source))
    path = "" if PurePosixPath(subset.path) == PurePosixPath(".") else subset.path
    if path:
        try:
            path = checked_path(path, root)
        except UserError as error:
            raise error.about(f"{dataset.setting('subsets')}: path") from None
    return SubsetReader(dataset, subset, index, root, path)


def label(folder: Path) -> str:
    return "" if folder == Path(".") else f"{folder.as_posix().rstrip('/')}/"


def checked_path(path: str, root: Root) -> str:
    """Return the path of a folder below the root, in the Unicode form on disk."""
    name = root.on_disk(checked_name(path, root))
    if not (root.folder / name).exists():
        text = f"'{name}' does not exist in {root.place('')}. Add the folder or correct the path."
        raise UserError(Problem("folder-missing", text))
    if not (root.folder / name).is_dir():
        fix = import_first(root.place(name)) if TO_IMPORT.fullmatch(name) else "Name a folder."
        raise UserError(Problem("source-not-folder", f"'{name}' is a file, but a folder is expected. {fix}"))
    if not root.holds(root.folder / name / "x"):  # any name in it
        text = f"'{name}' is a link that leads out of {root.place('')}. Put the images themselves there."
        raise UserError(Problem("name-outside-source", text))
    return name


def missing_source(text: str) -> Problem:
    """Return the problem with a dataset.source that is no folder."""
    source = Path(text)
    hub_name = HUB_DATASET.fullmatch(text)
    if source.is_file() and TO_IMPORT.fullmatch(source.name):
        return Problem("source-not-imported", f"'{text}' is a file of many images. {import_first(source)}")
    if source.is_file():
        hub = " " + import_first("OWNER/NAME@COMMIT") if source.suffix in (".yaml", ".yml") else ""
        return Problem("source-not-folder", f"'{text}' is a file, but a folder is expected.{hub or ' Name a folder.'}")
    if hub_name and (hub_name[2] or not source.parent.is_dir()):
        fix = import_first(hub_name[1] + (hub_name[2] or ""))
        return Problem("source-missing", f"'{text}' does not exist. If it is a dataset of the Hugging Face Hub: {fix}")
    fix = "Run `dvc pull` for tracked data, or name a folder of your own."
    return Problem("source-missing", f"'{text}' does not exist. {fix}")


def import_first(source: Path | str) -> str:
    return f"Unpack it once with `lora-dag import {source} data/mine`, then set dataset.source=data/mine."


def read_folder(reader: SubsetReader) -> None:
    if reader.mask_folder:
        if not PurePosixPath(reader.mask_folder).parts:
            text = (
                f"{reader.dataset.setting('mask')}: '{reader.mask_folder}' is the folder of the images themselves."
                " Name a folder below it that holds only the masks."
            )
            raise UserError(Problem("mask-invalid", text))
        try:
            checked_name(reader.mask_folder, reader.root)
        except UserError as error:
            raise error.at(reader.dataset.setting("mask")) from None
    tree = scan(reader.root, reader.relative_folder, reader.mask_folder)
    masks = mask_files.take_out(tree, reader.mask_folder)
    if tree.metadata and (tree.images or not tree.to_import):
        read_metadata(reader, tree)
    elif tree.to_import:
        text = f"{reader.place}: no stage reads {short(tree.to_import[0])}. {import_first(reader.place)}"
        raise UserError(Problem("source-not-imported", text))
    elif tree.images:
        read_loose(reader, tree)
    else:
        raise UserError(no_images(reader, tree))
    if not (reader.entries or reader.problems):
        raise UserError(Problem("dataset-empty", f"{reader.place}: the folder has no images. Add images."))
    warn_of_unread_files(reader, tree)
    mask_files.attach(reader, masks)


def no_images(reader: SubsetReader, tree: Tree) -> Problem:
    counts = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in [*tree.texts, *tree.others])
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())[:5]) or "nothing"
    text = f"{reader.place}: the folder has neither images nor metadata.jsonl (found {listed}). Add images."
    return Problem("dataset-empty", text)


def warn_of_unread_files(reader: SubsetReader, tree: Tree) -> None:
    """Warn of files that may be images of an unknown suffix, such as raw images of cameras, or caption files."""
    problem_names = {problem.file_name for problem in reader.problems if problem.file_name}
    beside = {name for names in files_beside(tree.images, tree.others).values() for name in names}
    known = problem_names.union(reader.names)
    unread = [
        name for name in tree.others if name not in known and not is_companion(name) and not name.endswith(".json")
    ]
    captions = [reader.relative_name(name) for name in unread if name in beside]
    images = [reader.relative_name(name) for name in unread if name not in beside]
    place, shown_captions, shown_images = reader.place, examples(captions), examples(images)
    reader.warn_about(
        "caption-file-unread",
        len(captions),
        f"file beside images of {place} is not read ({shown_captions}). Captions are read from .txt files.",
        f"files beside images of {place} are not read ({shown_captions}). Captions are read from .txt files.",
    )
    reader.warn_about(
        "file-not-image",
        len(images),
        f"file in {place} has no suffix of an image and is not read ({shown_images}). Convert it if it is an image.",
        f"files in {place} have no suffix of an image and are not read ({shown_images}). Convert images among them.",
    )
