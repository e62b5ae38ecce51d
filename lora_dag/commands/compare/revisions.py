"""Find the commit of a branch, tag, hash or DVC experiment, and read its files."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_dag.core.console import Problem, UserError
from lora_dag.pipeline.git import git

WORKSPACE = "workspace"
Experiments = dict[tuple[str, str], str]
"""(baseline commit, experiment name) -> commit, the newest first."""


def add_revisions(parser: argparse.ArgumentParser) -> None:
    text = "revisions; all others are compared with the first (default: HEAD workspace)"
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help=text)


def with_defaults(names: Sequence[str]) -> list[str]:
    """Return the given names, completed with HEAD and the workspace."""
    return [*names, *("HEAD", WORKSPACE)[len(names) :]]


def find_commit(name: str) -> str | None:
    """Return the commit of a branch, tag, hash or DVC experiment; None for the workspace.

    Raises:
        UserError: no such revision (near names are listed), or several experiments with this name.
    """
    if name == WORKSPACE:
        return None
    if shutil.which("git") is None:
        raise UserError(Problem("git-missing", "git: the program is not on PATH. Install it."))
    if git("rev-parse", "--git-dir") is None:
        text = "the current folder is not in a git repository. Run the command in a clone."
        raise UserError(Problem("not-a-repository", text))
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return commit.decode().strip() if commit else find_experiment(name)


def find_experiment(name: str) -> str:
    experiments = list_experiments()
    found = {baseline: commit for (baseline, experiment), commit in experiments.items() if experiment == name}
    if not found:
        raise unknown_revision(name, (experiment for _, experiment in experiments))
    if len(found) == 1:
        return next(iter(found.values()))
    head = head_commit()
    if head not in found:
        listed = ", ".join(sorted(commit[:7] for commit in found.values()))
        text = f"got '{name}', but experiments of {len(found)} commits have this name. Use a hash: {listed}."
        raise UserError(Problem("revision-ambiguous", text))
    return found[head]


def list_experiments() -> Experiments:
    """Return DVC's experiments, which git has as refs/exps/<2 digits>/<38 digits>/<name>."""
    arguments = ("--sort=-committerdate", "--format=%(refname) %(objectname)", "refs/exps")
    found = {}
    for line in (git("for-each-ref", *arguments) or b"").decode().splitlines():
        match = re.fullmatch(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(\S+) (\w+)", line)
        if match:
            found[match[1] + match[2], match[3]] = match[4]
    return found


def unknown_revision(name: str, experiments: Iterable[str]) -> UserError:
    refs = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes") or b""
    runs = list(dict.fromkeys(experiments))
    known = [*runs, *sorted({*refs.decode().split(), WORKSPACE}.difference(runs))]
    near = difflib.get_close_matches(name, known, n=3)
    names = f"near: {', '.join(near)}" if near else f"known: {', '.join(known[:5])}{', ...' * (len(known) > 5)}"
    shallow = (git("rev-parse", "--is-shallow-repository") or b"").strip() == b"true"
    hint = " This clone is shallow: `git fetch --unshallow` fetches all commits." if shallow else ""
    text = f"got '{name}', but no commit, branch, tag or DVC experiment has this name ({names}).{hint}"
    return UserError(Problem("unknown-revision", text))


def head_commit() -> str:
    """Return the commit of HEAD; empty outside of a repository."""
    return (git("rev-parse", "--verify", "--quiet", "HEAD") or b"").decode().strip()


def parents(commit: str) -> list[str]:
    return (git("rev-parse", f"{commit}^@") or b"").decode().split()


def read_file(commit: str | None, path: str) -> bytes | None:
    """Return a file of a commit or of the workspace (None) by its path from the current folder; None if missing."""
    if commit is not None:
        return git("show", f"{commit}:./{path}")
    return Path(path).read_bytes() if Path(path).is_file() else None
