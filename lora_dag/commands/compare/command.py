"""Compare revisions: parameters, metrics, and whether the held-out loss differs by more than noise.

In: params.yaml and reports/ of two or more revisions (commit, branch, tag, DVC experiment, or the workspace).
Out: compare/A..B/compare.md and compare.html, samples.png and, where datasets differ, dataset-B.png with the images
that changed; the page is also printed.
Run: `lora-dag compare [A] [B ...]`, such as `lora-dag compare main brave-owl`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_dag.commands.compare.page import write_page
from lora_dag.commands.compare.repeats import find_repeats
from lora_dag.commands.compare.revision_report import RevisionReport, read_revision
from lora_dag.commands.compare.revisions import add_revisions, with_defaults
from lora_dag.commands.compare.sheets import draw_images, file_name, sliders
from lora_dag.commands.compare.verdict import judge
from lora_dag.core.console import Problem, UserError, as_path, log
from lora_dag.core.files import replaced, sha256_json, write_text

MAX_FOLDER = 100  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_revisions(parser)
    parser.add_argument("--out", type=as_path, default=Path("compare"), metavar="DIR", help="(default: compare)")


def main(args: argparse.Namespace) -> None:
    names = with_defaults(args.revisions)
    compare(read_revisions(names), args.out / folder_name(names))


def folder_name(names: Sequence[str]) -> str:
    """Return a name like ``main..rank-16``; a long name is cut and gets a digest."""
    whole = "..".join(map(file_name, names))
    return whole if len(whole) <= MAX_FOLDER else f"{whole[:MAX_FOLDER]}-{sha256_json(list(names))[:8]}"


def read_revisions(names: Sequence[str]) -> list[RevisionReport]:
    """Read the reports of each revision.

    Raises:
        UserError: the problems of all revisions.
    """
    revisions: list[RevisionReport] = []
    problems: list[Problem] = []
    for name in names:
        try:
            revisions.append(read_revision(name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return revisions


def compare(revisions: Sequence[RevisionReport], out: Path) -> None:
    """Write the page and print it."""
    first, *others = revisions
    repeats = find_repeats(revisions)
    verdicts = [judge(first, revision, [*others, *repeats]) for revision in others]
    with replaced(out) as folder:
        page = write_page(revisions, verdicts, draw_images(revisions, folder), folder)
        write_text(folder / "compare.md", page)
        write_text(folder / "compare.html", html_page(revisions, page, folder))
    log.info("%s", page)
    log.info("wrote       %s", out)


def html_page(revisions: Sequence[RevisionReport], markdown: str, folder: Path) -> str:
    """Return the page as HTML, with sliders between the samples of the first and the last revision."""
    from lora_dag.pages.html import page

    title = markdown.partition("\n")[0].removeprefix("# ")
    heading = "## Samples\n\n"
    before, _, after = markdown.rpartition(heading)
    return page(title, f"{before}{heading}SLIDERS\n\n{after}", folder, {"SLIDERS": sliders(revisions)})
