"""Shell completion of ``lora-dag``: commands, options, files, settings, revisions and runs.

In bash or zsh: ``eval "$(register-python-argcomplete lora-dag)"``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_dag.commands import make_parser
from lora_dag.core import clone


def complete(line: str) -> None:
    """Print the possible completions of the command line, and exit."""
    import argcomplete

    parser = make_parser(*line.split()[1:2])
    for action in arguments(parser):
        action.completer = COMPLETERS.get(action.dest)  # type: ignore[attr-defined]  # argcomplete's own attribute
    argcomplete.autocomplete(parser)


def arguments(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Return the arguments of all commands in the parser."""
    (choices,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return (action for own in choices.values() for action in own._actions)


def root() -> Path:
    return clone.find(Path.cwd()) or Path()


def settings(**_: Any) -> list[str]:
    """Return ``lora.rank=`` and every other key of params.yaml."""
    from lora_dag.core.params import read_yaml

    tree = read_yaml(root() / "params.yaml")
    return [f"{section}.{key}=" for section, values in tree.items() for key in values]


def revisions(**_: Any) -> list[str]:
    """Return branches, tags and DVC experiments."""
    from lora_dag.commands.compare.revisions import WORKSPACE, list_experiments
    from lora_dag.pipeline.git import git

    refs = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes") or b""
    return ["HEAD", WORKSPACE, *refs.decode().split(), *(name for _, name in list_experiments())]


def runs(**_: Any) -> list[str]:
    """Return runs of sweeps, such as ``raw/rank-16-s0``."""
    folder = root() / "runs"
    return [path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*-s*/reports")]


COMPLETERS = {"overrides": settings, "revisions": revisions, "against": revisions, "commit": revisions, "run": runs}
"""Argument destination -> completer."""
