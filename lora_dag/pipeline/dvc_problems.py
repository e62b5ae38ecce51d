"""Problems of dvc.yaml and dvc.lock that gate, explain and relock report in the same words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lora_dag.core.console import Problem, UserError, warn
from lora_dag.pipeline.dvc_files import LOCK
from lora_dag.pipeline.git import git

INVALID = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
"""Exceptions that reading a file raises whose content DVC would not write."""


def conflict_problem(lock: bytes) -> Problem | None:
    """Return the problem of a dvc.lock in which git left the markers of a merge conflict."""
    if b"\n<<<<<<< " not in b"\n" + lock:
        return None
    return Problem(
        "lock-conflict",
        "dvc.lock: git left merge conflicts in the file. Take the branch that has the merged parameters and data "
        "(`git checkout --ours dvc.lock` or `--theirs`), then run `lora-dag relock`.",
    )


def unmerged_problem() -> Problem | None:
    """Return the problem of a dvc.lock that both branches of an unfinished merge have changed.

    git keeps the version of one branch as a whole (.gitattributes): lines of two runs are of no run.
    """
    if not git("ls-files", "--unmerged", "--", str(LOCK)):
        return None
    branch = (git("rev-parse", "--abbrev-ref", "HEAD") or b"HEAD").decode().strip()
    return Problem(
        "lock-unmerged",
        f"dvc.lock: both branches of the merge changed the file, and this version is the one of {branch}. If the "
        "runs of the other branch are right, run `git checkout --theirs dvc.lock` and repeat this command.",
    )


def warn_of_merge() -> None:
    """Warn of an unfinished merge that changed dvc.lock in both branches."""
    if problem := unmerged_problem():
        warn(problem.code, problem)


@contextlib.contextmanager
def valid_dvc_file(path: str | Path) -> Iterator[None]:
    """Turn the exceptions of INVALID into a problem of ``path``.

    Raises:
        UserError: the file has a content that DVC would not write.
    """
    try:
        yield
    except INVALID:
        raise UserError(invalid_problem(str(path))) from None


def invalid_problem(path: str) -> Problem:
    """Return the problem of a file whose content DVC would not write."""
    return Problem(
        "dvc-file-invalid",
        f"{path}: the content does not have DVC's format. `dvc status` shows the line; restore the file with "
        "`git checkout`, or run `dvc repro`.",
    )
