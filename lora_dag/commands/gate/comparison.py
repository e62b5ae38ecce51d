"""Comparison of this folder with another revision: the page of compare, and the paired change of the held-out loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_dag.commands.compare.page import write_page
from lora_dag.commands.compare.repeats import find_repeats
from lora_dag.commands.compare.revision_report import read_commit, read_revision
from lora_dag.commands.compare.revisions import WORKSPACE, find_commit
from lora_dag.commands.compare.verdict import MIN_IMAGES, Verdict, judge
from lora_dag.core.console import Problem, UserError
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pages.markdown import code

BRANCH_NAME = "this branch"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of this folder's run with the run of a revision."""

    page: str
    """Markdown."""
    change: Estimate | str
    """Relative change of the held-out loss with its 95 % interval; or the reason why there is none."""
    nothing_common: bool = False
    """Whether the two share no held-out images, with intact reports on this branch."""
    shared: str = ""
    """Number of shared held-out images in words; empty if both have the same held-out images."""


def commit_to_compare(name: str) -> str:
    """Return the commit of the revision to compare with.

    Raises:
        UserError: no such revision, or the name of this folder.
    """
    commit = find_commit(name) if name else None  # an empty one is a variable of CI that is not set
    if commit is None:
        expected = "a commit, branch, tag or DVC experiment is expected. Write --against origin/main."
        raise UserError(Problem("revision-unusable", f"--against: got '{name}', but {expected}"))
    return commit


def compare_with(name: str, commit: str) -> Comparison:
    """Compare params.yaml and reports/ of this folder with a revision, even if one of the two has no reports.

    Seed noise is estimated from the history of the revision alone. Nobody has reviewed the runs of this branch, and an
    invented run would make the interval as wide as one likes.
    """
    try:
        branch = dataclasses.replace(read_revision(WORKSPACE), name=BRANCH_NAME)
    except UserError as error:
        return no_comparison(name, error)
    try:
        target = read_commit(name, commit)
    except UserError as error:
        return dataclasses.replace(no_comparison(name, error), nothing_common=True)
    verdict = judge(target, branch, find_repeats([target]))
    page = write_page([target, branch], [verdict], images={}, folder=Path())
    return Comparison(page, relative_change(verdict), is_empty(verdict), shared_images_text(verdict))


def no_comparison(name: str, error: UserError) -> Comparison:
    reason = f"not comparable with {name}: {code(' '.join(error.problems), max_length=400)}"  # quotes files
    return Comparison(f"There is no comparison, because the run is {reason}.", reason)


def relative_change(verdict: Verdict) -> Estimate | str:
    """Return the change as a share of the revision's loss; or the reason why there is none."""
    if verdict.word == "not comparable":
        return str(verdict)
    change = Estimate(0.0, 0.0, 0.0) if verdict.word == "equal" or not verdict.loss else verdict.change
    return Estimate(*(value / (verdict.loss or 1.0) for value in dataclasses.astuple(change)))


def is_empty(verdict: Verdict) -> bool:
    return verdict.word == "not comparable" and verdict.num_images < MIN_IMAGES


def shared_images_text(verdict: Verdict) -> str:
    """Return ``12 shared images, of 25 and 13``; empty if both have the same held-out images, or none."""
    n, (target, branch) = verdict.num_images, verdict.num_each
    if (target, branch) in ((n, n), (0, 0)):
        return ""
    return f"{n} shared images, of {target} and {branch}"
