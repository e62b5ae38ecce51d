"""A folder of loose pictures with a caption file beside each, as most trainers read them, or one prompt for all.

The caption of ``fox.jpg`` is in ``fox.txt``, ``fox.caption`` (the default of kohya's trainers) or ``fox.jpg.txt``;
or in the caption column of ``fox.json``, which counts first.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lora_dag.core.console import UserError, plural
from lora_dag.pictures.read import read_regular
from stages.prepare import captions, side_files, split_names
from stages.prepare.listing import Problem
from stages.prepare.names import (
    COMPANIONS,
    NUM_EXAMPLES,
    Tree,
    checked_file,
    checked_name,
    clash,
    folded,
    is_about,
    nfc,
    printable,
    short,
    stem,
)
from stages.prepare.subset_reader import SubsetReader, collect_errors, instance_prompt
from stages.prepare.tables import parse_object

REPEATS = re.compile(r"\d+_")  # kohya's trainers read 10_name as: ten times per epoch
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".txt"}
"""Suffixes of files that may hold the captions of all pictures under a name that nobody reads."""
MIXED_LINES = (
    "{hold} another number of captions than others in {place} ({shown}): each line of a caption file is one, so put a"
    " caption that goes over several lines on one"
)


@dataclass
class Beside:
    """What lies beside the pictures of a folder, by picture."""

    texts: dict[str, list[str]]
    """Caption files."""
    records: dict[str, dict[str, Any]]
    """What a .json holds."""
    broken: dict[str, UserError]
    """What is wrong with a .json that holds no object; it may be another program's."""
    folded: dict[str, str]
    """All caption files by ``folded`` name."""


def read_loose(reader: SubsetReader, tree: Tree) -> None:
    in_case = {folded(name): name for name in tree.texts}
    beside = Beside(files_beside(tree.pictures, tree.texts), *records_beside(reader, tree), in_case)
    captioned = beside.texts.keys() | {name for name, record in beside.records.items() if reader.column in record}
    side_files.refuse(reader, [name for name in tree.pictures if name not in captioned], tree.pictures)
    used = {text for texts in beside.texts.values() for text in texts}
    suffixes = sorted({PurePosixPath(name).suffix.lower() for name in used}) or [".json"]
    where = f"the {' and '.join(suffixes)} files of {reader.place}"
    prompt = instance_prompt(reader, bool(captioned), where, missing_captions(reader, tree, beside.records))
    seen: dict[str, str] = {}
    for name in tree.pictures:
        add_loose(reader, name, prompt, beside, seen)
    reader.problems += linked_folders(reader, tree)
    orphans = [name for name in tree.texts if name not in used and not is_about(name)]
    reader.warn_about(
        len(orphans),
        f"caption file in {reader.place} belongs to no picture and is left out",
        f"caption files in {reader.place} belong to no picture and are left out",
    )
    warn_of_lines(reader)
    warn_of_kohya_repeats(reader)


def files_beside(pictures: list[str], files: list[str]) -> dict[str, list[str]]:
    """Picture -> the files that are named like it, with their suffix in place of its own or after it."""
    by_stem = defaultdict(list)
    for file in files:
        by_stem[stem(file)].append(file)
    found = {name: by_stem.get(stem(name), []) + by_stem.get(nfc(name), []) for name in pictures}
    return {name: beside for name, beside in found.items() if beside}


def records_beside(reader: SubsetReader, tree: Tree) -> tuple[dict[str, dict[str, Any]], dict[str, UserError]]:
    """``Beside.records`` and ``Beside.broken``."""
    jsons = [name for name in tree.others if name.lower().endswith(".json")]
    records, broken = {}, {}
    for name, files in files_beside(tree.pictures, jsons).items():
        try:
            records[name] = read_record(reader, files[0])
        except UserError as error:
            broken[name] = error
    return records, broken


def read_record(reader: SubsetReader, name: str) -> dict[str, Any]:
    path = reader.root.folder / checked_file(checked_name(name, reader.root), reader.root)
    return parse_object(read_regular(path, name, captions.MAX_TEXT_BYTES), short(name))


def missing_captions(reader: SubsetReader, tree: Tree, records: dict[str, dict[str, Any]]) -> str:
    """What to say where no picture has a caption; files that may hold captions come first."""
    cures = (
        f'write metadata.jsonl with rows such as {{"file_name": "red-apple.png", "{reader.column}": "red apple"}}, or'
        " red-apple.txt beside red-apple.png, or set dataset.instance_prompt to one caption for all"
    )
    return f"{reader.place}: pictures without captions; {'; '.join([*unread(reader, tree, records), cures])}"


def unread(reader: SubsetReader, tree: Tree, records: dict[str, dict[str, Any]]) -> list[str]:
    """Files that may hold captions and are not read, each kind with what to do."""
    found = []
    keys = Counter(key for values in records.values() for key, value in values.items() if isinstance(value, str))
    if keys:
        shown = ", ".join(short(key) for key, _ in keys.most_common(5))
        found.append(
            f"{len(records)} .json files beside them have no '{reader.column}' but {shown}: set dataset.caption_column"
        )
    for suffix, names in other_suffixes(tree).items():
        found.append(
            f"{len(names)} {suffix} files lie beside them ({short(names[0])}): if these hold captions, rename them to"
            f' .txt (for f in *{suffix}; do mv "$f" "${{f%{suffix}}}.txt"; done)'
        )
    stems = {stem(picture) for picture in tree.pictures}
    files = [name for name in [*tree.others, *tree.texts] if stem(name) not in stems and not is_about(name)]
    if tables := [name for name in files if PurePosixPath(name).suffix.lower() in TABLES]:
        found.append(
            f"{short(tables[0])} is not read under that name: make it metadata.jsonl or metadata.csv, with a column"
            " file_name"
        )
    return found


def other_suffixes(tree: Tree) -> dict[str, list[str]]:
    """Suffix -> files that are named like a picture, and of which nobody knows what they are."""
    found = defaultdict(list)
    for names in files_beside(tree.pictures, tree.others).values():
        for name in names:
            suffix = PurePosixPath(name).suffix
            if suffix and suffix.lower() not in COMPANIONS | {".json"}:
                found[suffix].append(name)
    return found


def add_loose(
    reader: SubsetReader, name: str, prompt: tuple[str, ...] | None, beside: Beside, seen: dict[str, str]
) -> None:
    problems: list[str] = []
    record = beside.records.get(name, {})
    safe = collect_errors(problems, lambda: checked_file(checked_name(name, reader.root), reader.root))
    found = prompt or collect_errors(problems, lambda: caption_of(reader, name, beside))
    split = collect_errors(problems, lambda: split_names.from_column(record.get("split"), reader.dataset.heldout_split))
    first = seen.setdefault(folded(name), name)
    if first != name:
        problems.append(clash(name, first))
    place = reader.root.place(name)
    reader.problems += [Problem(place, text, safe) for text in problems]
    if not problems and found is not None:
        reader.add(name, found, place, split)


def caption_of(reader: SubsetReader, name: str, beside: Beside) -> tuple[str, ...]:
    record, texts = beside.records.get(name, {}), beside.texts.get(name, [])
    if reader.column in record:
        return captions.from_value(record, reader.column)
    if not texts and name in beside.broken:
        raise beside.broken[name]
    if not texts:
        raise UserError(no_caption(name, beside))
    if len(texts) > 1:
        shown = ", ".join(map(printable, texts))
        raise UserError(f"'{printable(name)}' has {len(texts)} caption files ({shown}); keep one")
    path = reader.root.folder / checked_file(checked_name(texts[0], reader.root), reader.root)
    return captions.from_text(read_regular(path, texts[0], captions.MAX_TEXT_BYTES), texts[0])


def no_caption(name: str, beside: Beside) -> str:
    wanted = PurePosixPath(name).with_suffix(".txt")
    other_case = beside.folded.get(folded(str(wanted)))
    if other_case:
        return f"'{printable(name)}' has no caption; rename {printable(other_case)} to {printable(wanted.name)}"
    return (
        f"'{printable(name)}' has no caption; write {printable(wanted.name)} beside it, or remove every caption file"
        " and set dataset.instance_prompt to one caption for all"
    )


def warn_of_lines(reader: SubsetReader) -> None:
    """A caption that was pasted with its line ends becomes several captions, each of a part of the picture."""
    several = [entry.file_name for entry in reader.entries if len(entry.captions) > 1]
    if several and len({len(entry.captions) for entry in reader.entries}) > 1:
        shown = ", ".join(map(short, several[:NUM_EXAMPLES])) + (", ..." if len(several) > NUM_EXAMPLES else "")
        hold = plural(len(several), "picture has", "pictures have")
        reader.warnings.append(MIXED_LINES.format(hold=hold, place=reader.place, shown=shown))


def linked_folders(reader: SubsetReader, tree: Tree) -> list[Problem]:
    """Folders are not entered by links: their pictures would be listed twice, or come from elsewhere."""
    return [
        Problem(
            reader.root.place(name),
            f"'{printable(name)}' is a link to a folder; put the pictures themselves there, or name the folder in"
            " dataset.subsets",
        )
        for name in tree.links
        if os.path.isdir(reader.root.folder / name)
    ]


def warn_of_kohya_repeats(reader: SubsetReader) -> None:
    folders = {
        reader.relative_name(name).partition("/")[0] for name in reader.names if "/" in reader.relative_name(name)
    }
    counted = sorted(folder for folder in folders if REPEATS.match(folder))
    if counted:
        times = counted[0].partition("_")[0]
        reader.warnings.append(
            f"folder names such as '{counted[0]}' set no repeats here; write dataset.subsets:"
            f" [{{path: {counted[0]}, repeats: {times}}}]"
        )
