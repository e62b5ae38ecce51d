"""A folder of loose pictures, with a .txt beside each (kohya's habit) or one prompt for all (DreamBooth's)."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from stages.core.console import UserError
from stages.core.containers import read_regular
from stages.prepare import captions
from stages.prepare.listing import Problem
from stages.prepare.mask_files import stem
from stages.prepare.names import Tree, checked_file, checked_name, clash, folded, is_about, printable
from stages.prepare.scope import Scope, attempt, instance_prompt

REPEATS = re.compile(r"\d+_")  # kohya's trainers read 10_name as: ten times per epoch


def read_loose(scope: Scope, tree: Tree) -> None:
    texts = {stem(name): name for name in tree.texts}
    stems = {stem(name) for name in tree.pictures}
    missing = (
        f"{scope.place}: pictures without captions; write metadata.jsonl with rows such as"
        f' {{"file_name": "red-apple.png", "{scope.column}": "red apple"}}, or red-apple.txt beside red-apple.png,'
        " or set dataset.instance_prompt to one caption for all"
    )
    prompt = instance_prompt(scope, bool(stems & texts.keys()), f"the .txt files of {scope.place}", missing)
    seen: dict[str, str] = {}
    for name in tree.pictures:
        add_loose(scope, name, prompt, texts, seen)
    scope.problems += linked_folders(scope, tree)
    orphans = [name for name in tree.texts if stem(name) not in stems and not is_about(name)]
    scope.warn_about(len(orphans), f".txt files in {scope.place} belong to no picture and are left out")
    warn_of_kohya_repeats(scope)


def add_loose(
    scope: Scope, name: str, prompt: tuple[str, ...] | None, texts: dict[str, str], seen: dict[str, str]
) -> None:
    problems: list[str] = []
    safe = attempt(problems, lambda: checked_file(checked_name(name, scope.root), scope.root))
    found = prompt or attempt(problems, lambda: text_beside(scope, name, texts))
    first = seen.setdefault(folded(name), name)
    if first != name:
        problems.append(clash(name, first))
    place = scope.root.place(name)
    file_name = None if safe is None else scope.root.prefix + safe
    scope.problems += [Problem(place, text, file_name) for text in problems]
    if not problems and found is not None:
        scope.add(name, found, place)


def text_beside(scope: Scope, name: str, texts: dict[str, str]) -> tuple[str, ...]:
    text = texts.get(stem(name))
    if text is None:
        wanted = PurePosixPath(name).with_suffix(".txt").name
        raise UserError(
            f"'{printable(name)}' has no caption; write {printable(wanted)} beside it, or remove every .txt and set"
            " dataset.instance_prompt to one caption for all"
        )
    path = scope.root.folder / checked_file(checked_name(text, scope.root), scope.root)
    return captions.from_text(read_regular(path, text, captions.MAX_TEXT_BYTES), text)


def linked_folders(scope: Scope, tree: Tree) -> list[Problem]:
    """Folders are not entered by links: their pictures would be listed twice, or come from elsewhere."""
    return [
        Problem(
            scope.root.place(name),
            f"'{printable(name)}' is a link to a folder; put the pictures themselves there, or name the folder in"
            " dataset.subsets",
        )
        for name in tree.links
        if os.path.isdir(scope.root.folder / name)
    ]


def warn_of_kohya_repeats(scope: Scope) -> None:
    folders = {scope.below_it(name).partition("/")[0] for name in scope.names if "/" in scope.below_it(name)}
    counted = sorted(folder for folder in folders if REPEATS.match(folder))
    if counted:
        times = counted[0].partition("_")[0]
        scope.warnings.append(
            f"folder names such as '{counted[0]}' set no repeats here; write dataset.subsets:"
            f" [{{path: {counted[0]}, repeats: {times}}}]"
        )
