"""The commands of ``lora-dag``, in the order in which a person meets them.

A command is one row below and one module with
    a docstring              the text of ``lora-dag NAME --help``; its last line says how to run it
    add_arguments(parser)    its arguments; a path has ``type=as_path``, so that it is relative to the caller's folder
    main(args)               the work, in the clone's root; UserError for what a person can mend
torch, diffusers, datasets and pandas are imported inside of functions: every ``--help`` takes less than a second.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
from typing import NamedTuple, NoReturn

from lora_dag.core.console import UserError


class Command(NamedTuple):
    module: str
    """Below ``lora_dag.commands``."""
    help: str


GROUPS = {
    "before a run": {
        "import": Command(
            "import_dataset.command", "unpack Parquet, WebDataset or a Hub dataset into the folder that the stages read"
        ),
        "check": Command("check", "check parameters, base, pictures, packages and disk before anything is computed"),
        "status": Command("cache.status", "show which encoded pictures and captions are valid, and why others are not"),
    },
    "during a training": {
        "preview": Command("preview", "draw the prompts under every new snapshot"),
    },
    "after a run": {
        "compare": Command("compare.command", "compare revisions: verdict, parameters, metrics, pictures"),
        "explain": Command("explain", "show what changed between two revisions, and which stages that concerns"),
        "draw": Command("draw", "draw several adapter files on one sheet, at every combination of scales"),
        "leaderboard": Command("leaderboard.command", "rank the runs of a sweep"),
        "relock": Command("relock", "accept results that edits of code do not change; nothing runs again"),
        "promote": Command(
            "promote", "make a run of a sweep the experiment of the workspace; nothing is trained again"
        ),
    },
    "to share": {
        "gate": Command("gate.command", "decide from its reports whether an experiment may be merged"),
        "verify": Command("verify", "check that this repository makes a file, and name the revision that made it"),
        "push": Command("push.command", "upload exports, model card and samples to the Hugging Face Hub"),
    },
    "to free space": {
        "gc": Command("cache.gc", "delete encoded pictures and captions that no run has used for long"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
STAGES = ("prepare", "cache_latents", "train", "validate", "export", "report")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command; ``args.main(args)`` runs it.

    Raises:
        UserError: there is no such command.
    """
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        refuse(name)
    parser = make_parser(name)
    if not argv:
        parser.print_help()
        parser.exit(2)
    return parser.parse_args(argv)


def refuse(name: str) -> NoReturn:
    if name.replace("-", "_") in STAGES:
        raise UserError(f"lora-dag {name}: this is a stage, not a command; run `dvc repro {name.replace('-', '_')}`")
    near = difflib.get_close_matches(name, COMMANDS, n=3)
    known = f"near: {', '.join(near)}" if near else f"commands: {', '.join(COMMANDS)}"
    raise UserError(f"lora-dag {name}: no such command ({known})")


def make_parser(name: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; only the named one is imported and has its arguments."""
    parser = argparse.ArgumentParser(
        prog="lora-dag",
        usage="lora-dag COMMAND ...",
        description=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(prog="lora-dag", dest="command", help=argparse.SUPPRESS)
    for each, command in COMMANDS.items():
        own = subparsers.add_parser(each, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if each == name:
            module = importlib.import_module(f"lora_dag.commands.{command.module}")
            own.description = module.__doc__
            own.set_defaults(main=module.main)
            module.add_arguments(own)
    return parser


def listing() -> str:
    """Every command with its line, in groups."""
    lines = [
        "Commands around the six stages, which `dvc repro` and `snakemake` run. `lora-dag COMMAND --help` says more.",
        "They act on the clone that the current folder belongs to. Paths on the command line are relative to the",
        "current folder, paths in params.yaml and `--set` to the root of the clone.",
    ]
    for group, rows in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12} {command.help}" for name, command in rows.items())]
    return "\n".join(lines)
