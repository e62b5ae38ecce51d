"""Names that a person gives to a revision -> commits: branches, tags, hashes, DVC experiments; and what lies there."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_dag.core.console import UserError
from lora_dag.pipeline.git import git

WORKSPACE = "workspace"
Experiments = dict[tuple[str, str], str]
"""(baseline commit, experiment name) -> commit, the newest first."""


def add_revisions(parser: argparse.ArgumentParser) -> None:
    text = "the others are compared with the first (default: HEAD workspace)"
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help=text)


def with_defaults(names: Sequence[str]) -> list[str]:
    """The names that were given; HEAD and the workspace for those that were not."""
    return [*names, *("HEAD", WORKSPACE)[len(names) :]]


def find_commit(name: str) -> str | None:
    """Commit of a branch, tag, hash or DVC experiment; None for the workspace.

    Raises:
        UserError: nothing of that name; the nearest names are given. Or several experiments have it.
    """
    if name == WORKSPACE:
        return None
    if shutil.which("git") is None:
        raise UserError("git: not found on PATH; install it")
    if git("rev-parse", "--git-dir") is None:
        raise UserError("this folder is in no git repository; run the command in a clone")
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
        raise UserError(f"{name}: experiments of {len(found)} commits have this name; name one by its hash: {listed}")
    return found[head]


def list_experiments() -> Experiments:
    """DVC keeps them as refs/exps/<2 digits>/<38 digits>/<name>."""
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
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    shallow = (git("rev-parse", "--is-shallow-repository") or b"").strip() == b"true"
    cure = "; this clone is shallow: `git fetch --unshallow` brings the others" if shallow else ""
    return UserError(f"{name}: no commit, branch, tag or DVC experiment of that name (near: {', '.join(near)}){cure}")


def head_commit() -> str:
    """Empty outside of a repository."""
    return (git("rev-parse", "--verify", "--quiet", "HEAD") or b"").decode().strip()


def parents(commit: str) -> list[str]:
    return (git("rev-parse", f"{commit}^@") or b"").decode().split()


def read_file(commit: str | None, path: str) -> bytes | None:
    """A file of a commit or of the workspace, by its path from the current folder; None where there is none."""
    if commit is not None:
        return git("show", f"{commit}:./{path}")
    return Path(path).read_bytes() if Path(path).is_file() else None
