"""Another commit's files for the gate to read, as they would be after a merge: nothing of them is run or imported."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_dag.core.console import UserError
from lora_dag.pipeline.git import git

AS_COMMITTED = ("core.symlinks=false", "core.hooksPath=/dev/null", "core.autocrlf=false")
NO_LFS = ("filter.lfs.smudge=", "filter.lfs.process=", "filter.lfs.required=false")  # it calls an address of the branch
"""A link becomes a file that holds its target, so that no path leaves the folder; no hook and no filter runs."""

SAFE_PATH = "PYTHONSAFEPATH"
"""`python -m dvc`, which the gate starts, imports no folder ``dvc`` of the branch."""


@contextlib.contextmanager
def merged(commit: str, into: str | None) -> Iterator[None]:
    """Inside, the current folder holds what merging ``commit`` into ``into`` gives, or ``commit`` where that is None.

    Raises:
        UserError: the two conflict.
    """
    tree = merge(commit, into) if into else f"{commit}^{{tree}}"
    prefix = (git("rev-parse", "--show-prefix") or b"").decode().strip()
    before, safe = Path.cwd(), os.environ.get(SAFE_PATH)
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        place = Path(folder, "tree").resolve()
        options = [word for setting in (*AS_COMMITTED, *NO_LFS) for word in ("-c", setting)]
        try:
            call(*options, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(place), into or commit)
            call(*options, "-C", str(place), "read-tree", "--reset", "-u", tree)
            if not (place / prefix).is_dir():
                raise UserError(f"{commit[:10]}: has no folder {prefix}")
            os.chdir(place / prefix)
            os.environ[SAFE_PATH] = "1"
            yield
        finally:
            os.chdir(before)
            os.environ.pop(SAFE_PATH, None)
            if safe is not None:
                os.environ[SAFE_PATH] = safe
            git("worktree", "remove", "--force", str(place))


def merge(commit: str, into: str) -> str:
    """Tree of the merge.

    Raises:
        UserError: the two conflict, or have no common history here.
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
        raise UserError(f"{commit[:10]} conflicts with {into[:10]} in {names}; merge {into[:10]} into it and run again")
    raise UserError(f"{commit[:10]} cannot be merged into {into[:10]}: {(done.stderr or 'git failed').splitlines()[0]}")


def call(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"git {arguments[-1]}: {done.stderr.strip()}")
