"""The comparison with another revision, by compare: its page, and the paired change of the held-out loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_dag.commands.compare.page import write_page
from lora_dag.commands.compare.repeats import find_repeats
from lora_dag.commands.compare.revisions import WORKSPACE, find_commit
from lora_dag.commands.compare.sides import read_commit, read_side
from lora_dag.commands.compare.verdict import MIN_PICTURES, Verdict, judge
from lora_dag.core.console import UserError
from lora_dag.evaluation.bootstrap import Estimate
from lora_dag.pages.markdown import code

HERE = "this branch"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """This folder's run against a revision's."""

    page: str
    """Markdown."""
    change: Estimate | str
    """Of the held-out loss, as a share of the revision's, with its 95 % interval; or why there is none."""
    nothing_common: bool = False
    """No held-out pictures to compare, and neither side's reports are at fault."""
    shared: str = ""
    """Of the held-out pictures, where the two do not hold out the same."""


def other(name: str) -> str:
    """Commit of the revision to compare with.

    Raises:
        UserError: nothing of that name, or this folder itself.
    """
    commit = find_commit(name) if name else None  # an empty one is a variable of CI that is not set
    if commit is None:
        raise UserError(f"--against: got '{name}'; name a commit, branch, tag or DVC experiment, such as origin/main")
    return commit


def compare(name: str, commit: str) -> Comparison:
    """This folder's params.yaml and reports/ against a revision's, also where one side has no reports.

    Runs of the revision's own history alone tell what a seed does: those of the branch are judged by nobody, and an
    invented one would widen the interval to any width.
    """
    try:
        here = dataclasses.replace(read_side(WORKSPACE), name=HERE)
    except UserError as error:
        return no_comparison(name, error)
    try:
        there = read_commit(name, commit)
    except UserError as error:
        return dataclasses.replace(no_comparison(name, error), nothing_common=True)
    verdict = judge(there, here, find_repeats([there]))
    page = write_page([there, here], [verdict], pictures={}, folder=Path())
    return Comparison(page, share(verdict), is_empty(verdict), shared(verdict))


def no_comparison(name: str, error: UserError) -> Comparison:
    reason = f"not comparable with {name}: {code('; '.join(error.problems), max_length=400)}"  # quotes files
    return Comparison(f"No comparison: {reason}.", reason)


def share(verdict: Verdict) -> Estimate | str:
    """The verdict's change as a share of the revision's loss; or why there is none."""
    if verdict.word == "not comparable":
        return str(verdict)
    change = Estimate(0.0, 0.0, 0.0) if verdict.word == "equal" or not verdict.loss else verdict.change
    return Estimate(*(value / (verdict.loss or 1.0) for value in dataclasses.astuple(change)))


def is_empty(verdict: Verdict) -> bool:
    return verdict.word == "not comparable" and verdict.num_pictures < MIN_PICTURES


def shared(verdict: Verdict) -> str:
    """``12 pictures that both hold out, of 25 and 13``; empty where they hold out the same, or nothing."""
    n, (there, here) = verdict.num_pictures, verdict.num_each
    if (there, here) in ((n, n), (0, 0)):
        return ""
    return f"{n} pictures that both hold out, of {there} and {here}"
