"""May this experiment be merged? Told without any data: from params.yaml, code, dvc.lock and reports/ alone.

In: the current folder, and params.yaml and reports/ of the revision compared with.
Out: a Markdown page with the verdict, the comparison and the sheets; on stderr a line per reason not to pass.
Run: `python -m stages.gate --against main`; exit code 0 passed, 2 not passed
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.artifacts import metrics
from stages.compare.revisions import find_commit
from stages.core import params, sharing
from stages.core.console import UserError, bare_parser, log, run
from stages.core.files import write_text
from stages.core.git import git
from stages.gate import against, limits, lock
from stages.gate.against import Comparison
from stages.gate.page import Place, write_page
from stages.report.params import ReportParams

METRICS = ("reports/metrics.json", "reports/train/metrics.json", "reports/export/metrics.json")


def main() -> None:
    args = arguments().parse_args()
    if args.out is not None:
        require_free(args.out)
    there = against.other(args.against) if args.against is not None else None
    place = Place(args.repository, reviewed(args.commit), args.against, there)
    problems = lock.problems()
    comparison = compare(args.against) if args.against is not None else None
    try:
        gates = params.load(Path("params.yaml")).section(ReportParams).gates
        answers = limits.answers(gates, measured(), comparison.change if comparison else None)
    except UserError as error:
        problems, answers = list(dict.fromkeys([*problems, *error.problems])), []
    unshared = sharing.unshared()
    show(write_page(place, problems, answers, comparison, unshared), args.out)
    for line in unshared:
        log.warning("warning: %s", line)
    closed = [str(answer) for answer in answers if not answer.passed]
    if problems or closed:
        raise UserError(*problems, *closed)
    log.info("passed      %d gates", len(answers))


def require_free(out: Path) -> None:
    """Before anything is written.

    Raises:
        UserError: the page would take the place of a file that the run reads or writes.
    """
    taken = next((path for path in lock.paths() if out.resolve().is_relative_to(path.resolve())), None)
    if taken:
        raise UserError(f"--out: {out} is, or lies in, {taken} of the run; name another file, such as gate.md")


def compare(revision: str) -> Comparison:
    """Also where one side has no reports: then the page says so in its place."""
    try:
        return against.compare(revision)
    except UserError as error:
        reason = f"not comparable with {revision}: {'; '.join(error.problems)}"
        return Comparison(f"No comparison: {reason}.", reason, {})


def show(page: str, out: Path | None) -> None:
    if out is None:
        log.info("%s", page)
    else:
        write_text(out, page)
        log.info("wrote       %s", out)


def arguments() -> argparse.ArgumentParser:
    parser = bare_parser(__doc__)
    parser.add_argument("--against", metavar="REV", help="compare with this commit, branch, tag or DVC experiment")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: the terminal)")
    parser.add_argument(
        "--repository", metavar="URL", help="link pictures there by commit: https://github.com/OWNER/NAME"
    )
    parser.add_argument("--commit", metavar="SHA", help="the reviewed commit (default: HEAD)")
    return parser


def reviewed(name: str | None) -> str | None:
    """The commit named, or HEAD's; None outside of a repository."""
    if name:
        return find_commit(name)
    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    return head.decode().strip() if head else None


def measured() -> dict[str, metrics.Value]:
    """Every figure in reports/; a file that is missing has none.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, metrics.Value] = {}
    for path in filter(Path.is_file, map(Path, METRICS)):
        found |= metrics.load(path)
    return found


if __name__ == "__main__":
    run(main)
