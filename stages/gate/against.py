"""The comparison with another revision, by ``stages.compare``: its page, and the paired change of the held-out loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from stages.compare.page import write_page
from stages.compare.repeats import find_repeats
from stages.compare.revisions import WORKSPACE, find_commit
from stages.compare.sides import Side, read_side
from stages.compare.verdict import Verdict, judge
from stages.core.console import UserError
from stages.core.evaluation import Estimate

HERE = "this branch"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """This folder's run against a revision's."""

    page: str
    """Markdown."""
    change: Estimate | str
    """Of the held-out loss, as a share of the revision's, with its 95 % interval; or why there is none."""
    moved_gates: dict[str, tuple[Any, Any]]
    """Gates that were set otherwise there: key -> value there, value here."""


def other(name: str) -> str:
    """Commit of the revision to compare with.

    Raises:
        UserError: nothing of that name, or this folder itself.
    """
    commit = find_commit(name) if name else None  # an empty one is a variable of CI that is not set
    if commit is None:
        raise UserError(f"--against: got '{name}'; name a commit, branch, tag or DVC experiment, such as origin/main")
    return commit


def compare(revision: str) -> Comparison:
    """This folder's params.yaml and reports/ against a revision's.

    Raises:
        UserError: one of the two has no reports, or they are damaged.
    """
    there, here = read_side(revision), dataclasses.replace(read_side(WORKSPACE), name=HERE)
    verdict = judge(there, here, find_repeats([there, here]))
    page = write_page([there, here], [verdict], pictures={}, folder=Path())
    return Comparison(page, share(verdict), moved_gates(there, here))


def share(verdict: Verdict) -> Estimate | str:
    """The verdict's change as a share of the revision's loss; or why there is none."""
    if verdict.word == "not comparable":
        return str(verdict)
    change = Estimate(0.0, 0.0, 0.0) if verdict.word == "equal" or not verdict.loss else verdict.change
    return Estimate(*(value / (verdict.loss or 1.0) for value in dataclasses.astuple(change)))


def moved_gates(there: Side, here: Side) -> dict[str, tuple[Any, Any]]:
    """None where the revision had no gates."""
    keys = [key for key in there.params if key.startswith("report.gates.")]
    values = {key: (there.params[key], here.params.get(key)) for key in keys}
    return {key: (before, now) for key, (before, now) in values.items() if before != now}
