"""Revisions side by side: what was set differently, what came of it, and whether the held-out pictures can tell.

In: params.yaml and reports/ of two or more revisions (commit, branch, tag, DVC experiment, or the workspace).
Out: compare/A..B/compare.md and compare.html, samples.png and, where datasets differ, dataset-B.png; the page on the
terminal. With --explain: which of data, base, code, parameters and environment changed, and what that ran anew.
Run: `python -m lora_dag.commands.compare [A] [B ...]`, such as `python -m lora_dag.commands.compare main brave-owl`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_dag.commands.compare import explain
from lora_dag.commands.compare.page import write_page
from lora_dag.commands.compare.repeats import find_repeats
from lora_dag.commands.compare.revisions import WORKSPACE
from lora_dag.commands.compare.sheets import draw_pictures, file_name, sliders
from lora_dag.commands.compare.sides import Side, read_side
from lora_dag.commands.compare.verdict import judge
from lora_dag.core.console import UserError, as_path, bare_parser, log, run
from lora_dag.core.files import replaced, sha256_json, write_text

MAX_FOLDER = 100  # characters


def main() -> None:
    args = arguments().parse_args()
    names = [*args.revisions, *("HEAD", WORKSPACE)[len(args.revisions) :]]
    if args.explain:
        for name in names[1:]:
            log.info("%s", explain.write_page(explain.read_lock(names[0]), explain.read_lock(name)))
    else:
        compare(read_sides(names), args.out / folder_name(names))


def arguments() -> argparse.ArgumentParser:
    parser = bare_parser(__doc__)
    parser.add_argument(
        "revisions",
        nargs="*",
        metavar="REVISION",
        help="the others are compared with the first (default: HEAD workspace)",
    )
    parser.add_argument("--explain", action="store_true", help="what changed, and which stages that ran anew")
    parser.add_argument("--out", type=as_path, default=Path("compare"), metavar="DIR", help="(default: compare)")
    return parser


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


if __name__ == "__main__":
    run(main)
