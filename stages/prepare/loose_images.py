"""Loose images: a folder of images with a caption file beside each, as most trainers read them, or one prompt for all.

The caption of ``fox.jpg`` is in ``fox.txt``, ``fox.caption`` (the default of kohya's trainers) or ``fox.jpg.txt``, or
in the caption column of ``fox.json``, which comes first.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import Problem, UserError, plural
from lora_dag.images.read import read_regular
from stages.prepare import captions, side_images, split_names
from stages.prepare.file_names import (
    checked_file,
    checked_name,
    examples,
    folded,
    name_clash,
    nfc,
    printable,
    short,
    stem,
)
from stages.prepare.file_tree import COMPANIONS, Tree, is_about
from stages.prepare.listing import RowProblem, row_problems
from stages.prepare.metadata_tables import parse_object
from stages.prepare.subset_reader import SubsetReader, collect_errors, instance_prompt

REPEATS = re.compile(r"\d+_")  # kohya's trainers read 10_name as: ten times per epoch
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".txt"}
"""Suffixes of files that may hold the captions of all images under a name that is not read."""


@dataclass
class Beside:
    """Files with captions beside the images of a folder, by image."""

    texts: dict[str, list[str]]
    """Image -> its caption files."""
    records: dict[str, dict[str, Any]]
    """Image -> the object in its .json file."""
    broken: dict[str, UserError]
    """Image -> the error of its .json file without an object, which may belong to another program."""
    folded: dict[str, str]
    """Folded name -> name of all caption files."""


def read_loose(reader: SubsetReader, tree: Tree) -> None:
    in_case = {folded(name): name for name in tree.texts}
    beside = Beside(files_beside(tree.images, tree.texts), *records_beside(reader, tree), in_case)
    captioned = beside.texts.keys() | {name for name, record in beside.records.items() if reader.column in record}
    side_images.refuse(reader, [name for name in tree.images if name not in captioned], tree.images)
    used = {text for texts in beside.texts.values() for text in texts}
    suffixes = sorted({PurePosixPath(name).suffix.lower() for name in used}) or [".json"]
    caption_files = f"the {' and '.join(suffixes)} files of {reader.place}"
    missing = missing_captions(reader, tree, beside.records)
    prompt = instance_prompt(reader, bool(captioned), caption_files, missing)
    seen: dict[str, str] = {}
    for name in tree.images:
        add_loose(reader, name, prompt, beside, seen)
    reader.problems += linked_folders(reader, tree)
    orphans = [name for name in tree.texts if name not in used and not is_about(name)]
    reader.warn_about(
        "caption-without-image",
        len(orphans),
        f"caption file in {reader.place} belongs to no image and is ignored.",
        f"caption files in {reader.place} belong to no image and are ignored.",
    )
    warn_of_lines(reader)
    warn_of_kohya_repeats(reader)


def files_beside(images: list[str], files: list[str]) -> dict[str, list[str]]:
    """Return image -> the files named like it, with their suffix in place of the image's own or after it."""
    by_stem = defaultdict(list)
    for file in files:
        by_stem[stem(file)].append(file)
    beside = {name: by_stem.get(stem(name), []) + by_stem.get(nfc(name), []) for name in images}
    return {name: names for name, names in beside.items() if names}


def records_beside(reader: SubsetReader, tree: Tree) -> tuple[dict[str, dict[str, Any]], dict[str, UserError]]:
    """Return ``Beside.records`` and ``Beside.broken``."""
    jsons = [name for name in tree.others if name.lower().endswith(".json")]
    records, broken = {}, {}
    for name, files in files_beside(tree.images, jsons).items():
        try:
            records[name] = read_record(reader, files[0])
        except UserError as error:
            broken[name] = error
    return records, broken


def read_record(reader: SubsetReader, name: str) -> dict[str, Any]:
    path = reader.root.folder / checked_file(checked_name(name, reader.root), reader.root)
    return parse_object(read_regular(path, name, captions.MAX_TEXT_BYTES), short(name))


def missing_captions(reader: SubsetReader, tree: Tree, records: dict[str, dict[str, Any]]) -> Problem:
    """Return the problem that no image has a caption. Files that may hold captions come first in its text."""
    fixes = (
        f'Write metadata.jsonl with rows such as {{"file_name": "red-apple.png", "{reader.column}": "red apple"}}, or'
        " red-apple.txt beside red-apple.png, or set dataset.instance_prompt to one caption for all."
    )
    text = f"{reader.place}: no image has a caption. {' '.join([*unread_captions(reader, tree, records), fixes])}"
    return Problem("captions-missing", text)


def unread_captions(reader: SubsetReader, tree: Tree, records: dict[str, dict[str, Any]]) -> list[str]:
    """Return sentences about files that may hold captions and are not read, one for each kind."""
    sentences = []
    keys = Counter(key for values in records.values() for key, value in values.items() if isinstance(value, str))
    if keys:
        listed_keys = ", ".join(short(key) for key, _ in keys.most_common(5))
        sentences.append(
            f"The {len(records)} .json files have no '{reader.column}', but {listed_keys}: set dataset.caption_column."
        )
    for suffix, names in other_suffixes(tree).items():
        sentences.append(
            f"If the {len(names)} {suffix} files ({short(names[0])}) hold captions, rename them to .txt:"
            f' for f in *{suffix}; do mv "$f" "${{f%{suffix}}}.txt"; done.'
        )
    stems = {stem(image) for image in tree.images}
    files = [name for name in [*tree.others, *tree.texts] if stem(name) not in stems and not is_about(name)]
    if tables := [name for name in files if PurePosixPath(name).suffix.lower() in TABLES]:
        sentences.append(
            f"If {short(tables[0])} holds captions, rename it to metadata.jsonl or metadata.csv, and its"
            " column of names to file_name."
        )
    return sentences


def other_suffixes(tree: Tree) -> dict[str, list[str]]:
    """Return suffix -> files of unknown kind that are named like an image."""
    by_suffix = defaultdict(list)
    for names in files_beside(tree.images, tree.others).values():
        for name in names:
            suffix = PurePosixPath(name).suffix
            if suffix and suffix.lower() not in COMPANIONS | {".json"}:
                by_suffix[suffix].append(name)
    return by_suffix


def add_loose(
    reader: SubsetReader, name: str, prompt: tuple[str, ...] | None, beside: Beside, seen: dict[str, str]
) -> None:
    problems: list[Problem] = []
    record = beside.records.get(name, {})
    safe_name = collect_errors(problems, lambda: checked_file(checked_name(name, reader.root), reader.root))
    texts = prompt or collect_errors(problems, lambda: caption_of(reader, name, beside))
    split = collect_errors(problems, lambda: split_names.from_column(record.get("split"), reader.dataset.heldout_split))
    first = seen.setdefault(folded(name), name)
    if first != name:
        problems.append(name_clash(name, first))
    place = reader.root.place(name)
    reader.problems += row_problems(problems, place, safe_name)
    if not problems and texts is not None:
        reader.add(name, texts, place, split)


def caption_of(reader: SubsetReader, name: str, beside: Beside) -> tuple[str, ...]:
    record, texts = beside.records.get(name, {}), beside.texts.get(name, [])
    if reader.column in record:
        return captions.from_value(record, reader.column)
    if not texts and name in beside.broken:
        raise beside.broken[name]
    if not texts:
        raise UserError(no_caption(name, beside))
    if len(texts) > 1:
        names = ", ".join(map(printable, texts))
        text = f"'{printable(name)}' has {len(texts)} caption files ({names}). Keep one."
        raise UserError(Problem("caption-ambiguous", text))
    path = reader.root.folder / checked_file(checked_name(texts[0], reader.root), reader.root)
    return captions.from_text(read_regular(path, texts[0], captions.MAX_TEXT_BYTES), texts[0])


def no_caption(name: str, beside: Beside) -> Problem:
    expected = PurePosixPath(name).with_suffix(".txt")
    other_case = beside.folded.get(folded(str(expected)))
    fix = (
        f"Rename {printable(other_case)} to {printable(expected.name)}."
        if other_case
        else f"Write {printable(expected.name)} beside it, or remove all caption files and set dataset.instance_prompt."
    )
    return Problem("caption-missing", f"'{printable(name)}' has no caption. {fix}")


def warn_of_lines(reader: SubsetReader) -> None:
    """Warn of different numbers of captions: a caption that was pasted with line ends becomes several captions."""
    several = [entry.file_name for entry in reader.entries if len(entry.captions) > 1]
    if several and len({len(entry.captions) for entry in reader.entries}) > 1:
        have = plural(len(several), "image has", "images have")
        text = f"{reader.place}: {have} several captions, unlike the others ({examples(several)})."
        fix = "Each line of a caption file is one caption, so write a long caption on one line."
        reader.warnings.append(Problem("caption-lines", f"{text} {fix}"))


def linked_folders(reader: SubsetReader, tree: Tree) -> list[RowProblem]:
    """Return a problem for each link to a folder: its images would be listed twice, or come from elsewhere."""
    return [
        RowProblem(
            "folder-linked",
            f"'{printable(name)}' is a link to a folder. Put the images themselves there, or name the folder in"
            " dataset.subsets.",
            reader.root.place(name),
        )
        for name in tree.links
        if os.path.isdir(reader.root.folder / name)
    ]


def warn_of_kohya_repeats(reader: SubsetReader) -> None:
    """Warn of folders such as ``10_fox``, whose number sets repeats in kohya's trainers."""
    folders = {
        reader.relative_name(name).partition("/")[0] for name in reader.names if "/" in reader.relative_name(name)
    }
    times = {folder: int(folder.partition("_")[0]) if REPEATS.match(folder) else 1 for folder in sorted(folders)}
    if len(set(times.values())) > 1:  # equal repeats have no effect
        counted = next(folder for folder in times if times[folder] > 1)
        subsets = ", ".join(f"{{path: {folder}, repeats: {number}}}" for folder, number in times.items())
        text = f"folder names such as '{counted}' set no repeats here. Write dataset.subsets: [{subsets}]."
        reader.warnings.append(Problem("folder-repeats-ignored", text))
