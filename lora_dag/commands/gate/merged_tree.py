"""Write the files of a commit, merged into another one, to a temporary folder: the gate reads them and runs none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_dag.core.console import Problem, UserError
from lora_dag.pipeline.git import git

AS_COMMITTED = ("core.symlinks=false", "core.hooksPath=/dev/null", "core.autocrlf=false")
"""A link becomes a file with its target as text, so that no path leaves the folder. No hook runs."""
NO_LFS = ("filter.lfs.smudge=", "filter.lfs.process=", "filter.lfs.required=false")
"""No LFS filter runs: it would call an address that the branch sets."""

SAFE_PATH = "PYTHONSAFEPATH"
"""With it, `python -m dvc` does not import a folder ``dvc`` of the branch."""


@contextlib.contextmanager
def merged(commit: str, into: str | None) -> Iterator[None]:
    """Make a folder with ``commit`` merged into ``into`` the current folder; with None, ``commit`` alone.

    Raises:
        UserError: the merge has conflicts, or the commit does not have the current folder.
    """
    tree = merge(commit, into) if into else f"{commit}^{{tree}}"
    prefix = (git("rev-parse", "--show-prefix") or b"").decode().strip()
    before, safe = Path.cwd(), os.environ.get(SAFE_PATH)
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        worktree = Path(folder, "tree").resolve()
        options = [word for setting in (*AS_COMMITTED, *NO_LFS) for word in ("-c", setting)]
        try:
            call(*options, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(worktree), into or commit)
            call(*options, "-C", str(worktree), "read-tree", "--reset", "-u", tree)
            if not (worktree / prefix).is_dir():
                text = f"{commit[:10]}: the folder {prefix} is missing in this commit. Run the gate in another folder."
                raise UserError(Problem("folder-missing", text))
            os.chdir(worktree / prefix)
            os.environ[SAFE_PATH] = "1"
            yield
        finally:
            os.chdir(before)
            os.environ.pop(SAFE_PATH, None)
            if safe is not None:
                os.environ[SAFE_PATH] = safe
            git("worktree", "remove", "--force", str(worktree))


def merge(commit: str, into: str) -> str:
    """Return the tree of the merge.

    Raises:
        UserError: the merge has conflicts, or the two have no common history in this clone.
    """
    done = subprocess.run(
        ["git", "merge-tree", "--write-tree", "--name-only", "--no-messages", into, commit],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    tree, *conflicts = done.stdout.splitlines() or [""]
    if done.returncode == 0:
        return tree
    if done.returncode == 1:
        names = ", ".join(conflicts)
        text = f"{commit[:10]}: conflicts with {into[:10]} in {names}. Merge {into[:10]} into the branch and run again."
        raise UserError(Problem("merge-conflict", text))
    reason = (done.stderr or "git failed").splitlines()[0]
    raise UserError(Problem("merge-failed", f"{commit[:10]}: git cannot merge it into {into[:10]} ({reason})."))


def call(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(Problem("git-failed", f"git {arguments[-1]}: {done.stderr.strip()}"))
