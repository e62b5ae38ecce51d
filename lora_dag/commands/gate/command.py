"""Decide whether an experiment may be merged, without its data: from params.yaml, code, dvc.lock and reports/ alone.

In: the current folder, or with --commit the result of merging that commit, whose code is never run; and params.yaml
and reports/ of the revision to compare with.
Out: a Markdown page with the verdict, the comparison and the sample sheets; on stderr one line per failure.
Run: `lora-dag gate --against main`; exit code 0: passed or neutral, 2: failed
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_dag.artifacts import metrics
from lora_dag.commands.compare.revision_report import METRICS_FILES
from lora_dag.commands.compare.revisions import find_commit
from lora_dag.commands.gate import limits, lock, merged_tree, recomputed_metrics, rule_changes
from lora_dag.commands.gate.comparison import commit_to_compare, compare_with
from lora_dag.commands.gate.limits import GateResult
from lora_dag.commands.gate.page import PageContext, write_page, write_unread
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError, as_path, log, plural, warn
from lora_dag.core.files import write_text
from lora_dag.core.param_errors import explain
from lora_dag.pipeline import dvc_files, sharing
from lora_dag.pipeline.git import git
from stages.report.params import Gates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="REV", help="compare with this commit, branch, tag or DVC experiment")
    parser.add_argument("--out", type=as_path, metavar="FILE", help="write the page to this file (default: print it)")
    parser.add_argument(
        "--repository", metavar="URL", help="link images in this repository, such as https://github.com/OWNER/NAME"
    )
    parser.add_argument(
        "--commit", metavar="REV", help="check this commit, merged into --against (default: the current folder)"
    )


def main(args: argparse.Namespace) -> None:
    if args.out is not None:
        require_free(args.out)
        args.out = args.out.absolute()
    target = commit_to_compare(args.against) if args.against is not None else None
    commit = reviewed(args.commit)
    own = args.commit is None
    uncommitted = own and bool(git("status", "--porcelain", "--untracked-files=no"))
    context = PageContext(args.repository, commit, args.against, target, own, uncommitted)
    with contextlib.ExitStack() as stack:
        if args.commit and commit:
            try:
                stack.enter_context(merged_tree.merged(commit, target))
            except UserError as error:
                show(write_unread(context, error.problems), args.out)
                raise
        check_folder(context, args.out)


def check_folder(context: PageContext, out: Path | None) -> None:
    """Check the current folder and write the page.

    Raises:
        UserError: the folder fails; one problem per reason.
    """
    problems = list(dict.fromkeys([*lock.problems(), *recomputed_metrics.problems()]))
    compared = (
        compare_with(context.against, context.against_commit) if context.against and context.against_commit else None
    )
    changes = rule_changes.find_changes(context.against_commit) if context.against_commit else []
    try:
        results = limits.check_limits(gates(), measured(), compared)
    except UserError as error:
        problems, results = list(dict.fromkeys([*problems, *error.problems])), []
    unshared = sharing.unshared_data(sources())
    show(write_page(context, problems, results, compared, changes, unshared), out)
    failed = [result.problem for result in results if not result.passed]
    if out is not None:  # a printed page says the same
        log_results(results, unshared)
    if problems or failed:
        raise UserError(*problems, *failed)


def log_results(results: Sequence[GateResult], unshared: Sequence[Problem]) -> None:
    for problem in unshared:
        warn(problem.code, problem)
    for result in results:
        if result.neutral:
            log.info("neutral     report.gates.%s: %s", result.gate, result.measured)
    log.info("passed      %s", plural(sum(result.passed and not result.neutral for result in results), "gate"))


def gates() -> Gates:
    """Read ``report.gates`` alone: other settings of the branch may be newer than this code.

    Raises:
        UserError: params.yaml is missing, or its gates are invalid.
    """
    path = Path("params.yaml")
    report = params.read_yaml(path).get("report")
    try:
        return Gates.model_validate(report.get("gates") if isinstance(report, dict) else None)
    except ValidationError as error:
        raise UserError(*explain("report.gates", Gates, error, params.Origin(path).place)) from None


def sources() -> list[str]:
    """Return the dataset and the base model of params.yaml; without those that are no text or missing."""
    tree: Mapping[str, Any] = {}
    with contextlib.suppress(UserError):  # check_folder reports it
        tree = params.read_yaml(Path("params.yaml"))
    found = [dvc_files.look_up(tree, key) for key in ("dataset.source", "model.pretrained")]
    return [source for source in found if isinstance(source, str)]


def require_free(out: Path) -> None:
    """Check ``--out`` before anything is written.

    Raises:
        UserError: the page would overwrite a file that the run reads or writes.
    """
    taken = next((path for path in lock.paths() if out.resolve().is_relative_to(path.resolve())), None)
    if taken:
        text = f"--out: got {out}, but the run uses {taken}. Write the page to another file: --out gate.md."
        raise UserError(Problem("out-in-use", text))


def show(page: str, out: Path | None) -> None:
    if out is None:
        log.info("%s", page)
    else:
        write_text(out, page)
        log.info("wrote       %s", out)


def reviewed(name: str | None) -> str | None:
    """Return the named commit, or the commit of HEAD; None outside of a repository.

    Raises:
        UserError: no such revision, or the name of this folder.
    """
    if name is not None:
        commit = find_commit(name) if name else None
        if commit is None:
            expected = "a commit, branch or tag is expected. Omit --commit to check this folder."
            raise UserError(Problem("revision-unusable", f"--commit: got '{name}', but {expected}"))
        return commit
    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    return head.decode().strip() if head else None


def measured() -> dict[str, metrics.Value]:
    """Return all metrics in reports/; missing files are skipped.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, metrics.Value] = {}
    for path in filter(Path.is_file, map(Path, METRICS_FILES)):
        found |= metrics.load(path)
    return found
