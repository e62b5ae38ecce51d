"""May this experiment be merged? Told without any data: from params.yaml, code, dvc.lock and reports/ alone.

In: the current folder, or with --commit what a merge of that commit would give, which is read and never imported; and
params.yaml and reports/ of the revision compared with.
Out: a Markdown page with the verdict, the comparison and the sheets; on stderr a line per reason not to pass.
Run: `lora-dag gate --against main`; exit code 0 passed or neutral, 2 not passed
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from pydantic import ValidationError

from lora_dag.artifacts import metrics
from lora_dag.commands.compare.revisions import find_commit
from lora_dag.commands.compare.sides import METRICS_FILES
from lora_dag.commands.gate import against, figures, limits, lock, rules, tree
from lora_dag.commands.gate.page import Place, write_page, write_unread
from lora_dag.core import params
from lora_dag.core.console import UserError, as_path, log, plural
from lora_dag.core.files import write_text
from lora_dag.core.param_errors import explain
from lora_dag.pipeline import sharing
from lora_dag.pipeline.git import git
from stages.report.params import Gates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="REV", help="compare with this commit, branch, tag or DVC experiment")
    parser.add_argument("--out", type=as_path, metavar="FILE", help="the page (default: the terminal)")
    parser.add_argument(
        "--repository", metavar="URL", help="link pictures there by commit: https://github.com/OWNER/NAME"
    )
    parser.add_argument(
        "--commit", metavar="REV", help="judge this commit, merged into that of --against (default: the current folder)"
    )


def main(args: argparse.Namespace) -> None:
    if args.out is not None:
        require_free(args.out)
        args.out = args.out.absolute()
    there = against.other(args.against) if args.against is not None else None
    commit = reviewed(args.commit)
    place = Place(args.repository, commit, args.against, there, own_gate=args.commit is None)
    with contextlib.ExitStack() as stack:
        if args.commit and commit:
            try:
                stack.enter_context(tree.merged(commit, there))
            except UserError as error:
                show(write_unread(place, error.problems), args.out)
                raise
        judge(place, args.out)


def judge(place: Place, out: Path | None) -> None:
    """The current folder.

    Raises:
        UserError: it does not pass; a line per reason.
    """
    problems = list(dict.fromkeys([*lock.problems(), *figures.problems()]))
    comparison = (
        against.compare(place.against, place.against_commit) if place.against and place.against_commit else None
    )
    changes = rules.changes(place.against_commit) if place.against_commit else []
    try:
        answers = limits.answers(gates(), measured(), comparison)
    except UserError as error:
        problems, answers = list(dict.fromkeys([*problems, *error.problems])), []
    unshared = sharing.unshared()
    show(write_page(place, problems, answers, comparison, changes, unshared), out)
    for line in unshared:
        log.warning("warning: %s", line)
    closed = [str(answer) for answer in answers if not answer.passed]
    if problems or closed:
        raise UserError(*problems, *closed)
    for answer in answers:
        if answer.neutral:
            log.info("neutral     report.gates.%s: %s", answer.gate, answer.measured)
    log.info("passed      %s", plural(sum(not answer.neutral for answer in answers), "gate"))


def gates() -> Gates:
    """``report.gates`` alone: the branch's other settings may be newer than this gate.

    Raises:
        UserError: no params.yaml, or other gates in it than there are.
    """
    path = Path("params.yaml")
    report = params.read_yaml(path).get("report")
    try:
        return Gates.model_validate(report.get("gates") if isinstance(report, dict) else None)
    except ValidationError as error:
        raise UserError(*explain(path, "report.gates", Gates, error)) from None


def require_free(out: Path) -> None:
    """Before anything is written.

    Raises:
        UserError: the page would take the place of a file that the run reads or writes.
    """
    taken = next((path for path in lock.paths() if out.resolve().is_relative_to(path.resolve())), None)
    if taken:
        raise UserError(f"--out: {out} is, or lies in, {taken} of the run; name another file, such as gate.md")


def show(page: str, out: Path | None) -> None:
    if out is None:
        log.info("%s", page)
    else:
        write_text(out, page)
        log.info("wrote       %s", out)


def reviewed(name: str | None) -> str | None:
    """The commit named, or HEAD's; None outside of a repository.

    Raises:
        UserError: nothing of that name, or the folder itself.
    """
    if name is not None:
        commit = find_commit(name) if name else None
        if commit is None:
            raise UserError(f"--commit: got '{name}'; name a commit, branch or tag, or leave it out for this folder")
        return commit
    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    return head.decode().strip() if head else None


def measured() -> dict[str, metrics.Value]:
    """Every figure in reports/; a file that is missing has none.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, metrics.Value] = {}
    for path in filter(Path.is_file, map(Path, METRICS_FILES)):
        found |= metrics.load(path)
    return found
