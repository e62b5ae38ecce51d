"""Revisions side by side: what was set differently, what came of it, and whether the held-out pictures can tell.

In: params.yaml and reports/ of two or more revisions (commit, branch, tag, DVC experiment, or the workspace).
Out: compare/A..B/compare.md and compare.html, samples.png and, where datasets differ, dataset-B.png with the images
that changed; the page on the terminal.
Run: `lora-dag compare [A] [B ...]`, such as `lora-dag compare main brave-owl`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_dag.commands.compare.page import write_page
from lora_dag.commands.compare.repeats import find_repeats
from lora_dag.commands.compare.revisions import add_revisions, with_defaults
from lora_dag.commands.compare.sheets import draw_pictures, file_name, sliders
from lora_dag.commands.compare.sides import Side, read_side
from lora_dag.commands.compare.verdict import judge
from lora_dag.core.console import UserError, as_path, log
from lora_dag.core.files import replaced, sha256_json, write_text

MAX_FOLDER = 100  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_revisions(parser)
    parser.add_argument("--out", type=as_path, default=Path("compare"), metavar="DIR", help="(default: compare)")


def main(args: argparse.Namespace) -> None:
    names = with_defaults(args.revisions)
    compare(read_sides(names), args.out / folder_name(names))


def folder_name(names: Sequence[str]) -> str:
    """``main..rank-16``; many names end in a digest of all."""
    whole = "..".join(map(file_name, names))
    return whole if len(whole) <= MAX_FOLDER else f"{whole[:MAX_FOLDER]}-{sha256_json(list(names))[:8]}"


def read_sides(names: Sequence[str]) -> list[Side]:
    """Each revision.

    Raises:
        UserError: what is wrong with any of them.
    """
    sides: list[Side] = []
    problems: list[str] = []
    for name in names:
        try:
            sides.append(read_side(name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return sides


def compare(sides: Sequence[Side], out: Path) -> None:
    """Write and log the page of ``sides``."""
    first, *others = sides
    repeats = find_repeats(sides)
    verdicts = [judge(first, side, [*others, *repeats]) for side in others]
    with replaced(out) as folder:
        page = write_page(sides, verdicts, draw_pictures(sides, folder), folder)
        write_text(folder / "compare.md", page)
        write_text(folder / "compare.html", html_page(sides, page, folder))
    log.info("%s", page)
    log.info("wrote       %s", out)


def html_page(sides: Sequence[Side], markdown: str, folder: Path) -> str:
    """The same with sliders from the first one's samples to the last one's."""
    from lora_dag.pages.html import page

    title = markdown.partition("\n")[0].removeprefix("# ")
    heading = "## Samples\n\n"
    before, _, after = markdown.rpartition(heading)
    return page(title, f"{before}{heading}SLIDERS\n\n{after}", folder, {"SLIDERS": sliders(sides)})
