"""The commands of ``lora-dag``, in the order in which a person meets them.

A command is one row below and one module with
    a docstring              the text of ``lora-dag NAME --help``; its last line says how to run it
    add_arguments(parser)    its arguments; a path has ``type=as_path``, so that it is relative to the caller's folder
    main(args)               the work, in the clone's root; UserError for problems that a user can correct
torch, diffusers, datasets and pandas are imported inside of functions: every ``--help`` takes less than a second.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
from typing import NamedTuple

from lora_dag.core.console import Parser, Problem, UserError
from lora_dag.core.help_text import HelpFormatter
from lora_dag.core.stage_start import STAGES


class Command(NamedTuple):
    module: str
    """Below ``lora_dag.commands``."""
    help: str


GROUPS = {
    "before a run": {
        "import": Command(
            "import_dataset.command", "unpack Parquet, WebDataset or a Hub dataset into the folder that the stages read"
        ),
        "check": Command("check", "check parameters, base, images, packages and disk before anything is computed"),
        "preset": Command("preset", "write the settings for a model on a GPU of some size into params.yaml"),
        "status": Command("status", "show which encoded images and captions are valid, and why others are not"),
    },
    "during a training": {
        "preview": Command("preview", "draw the prompts under every new snapshot"),
    },
    "after a run": {
        "compare": Command("compare.command", "compare revisions: verdict, parameters, metrics, images"),
        "explain": Command("explain", "show what changed between two revisions, and the stages that it affects"),
        "draw": Command("draw", "draw several adapter files on one sheet, at every combination of scales"),
        "leaderboard": Command("leaderboard.command", "rank the runs of a sweep"),
        "relock": Command("relock", "accept results that edits of code do not change; nothing runs again"),
        "promote": Command("promote", "copy a run of a sweep into the workspace; nothing is trained again"),
    },
    "to share": {
        "gate": Command("gate.command", "decide from its reports whether an experiment may be merged"),
        "verify": Command("verify", "check that this repository makes a file, and name the revision that made it"),
        "push": Command("push.command", "upload exports, model card and samples to the Hugging Face Hub"),
    },
    "to free space": {
        "gc": Command("gc", "delete encoded images and captions that no run has used for long"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments of a command; ``args.main(args)`` runs it.

    Raises:
        UserError: unknown command or wrong arguments.
    """
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise UserError(unknown_command(name))
    parser = make_parser(name)
    if not argv:
        parser.print_help()
        parser.exit(2)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def unknown_command(name: str) -> Problem:
    stage = name.replace("-", "_")
    if stage in STAGES:
        return Problem("unknown-command", f"lora-dag {name}: this is a stage, not a command. Run `dvc repro {stage}`.")
    near = difflib.get_close_matches(name, COMMANDS, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Commands: {', '.join(COMMANDS)}."
    return Problem("unknown-command", f"lora-dag {name}: unknown command. {hint}")


def make_parser(name: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands; only the named command is imported and has its arguments."""
    parser = Parser(
        prog="lora-dag",
        usage="lora-dag COMMAND ...",
        description=listing(),
        formatter_class=HelpFormatter,
    )
    subparsers = parser.add_subparsers(prog="lora-dag", dest="command", help=argparse.SUPPRESS)
    for each, command in COMMANDS.items():
        own = subparsers.add_parser(each, help=command.help, formatter_class=HelpFormatter)
        if each == name:
            module = importlib.import_module(f"lora_dag.commands.{command.module}")
            own.description = module.__doc__
            own.set_defaults(main=module.main, parser=own)
            module.add_arguments(own)
    return parser


def listing() -> str:
    """Return all commands with their help lines, in groups."""
    lines = [
        "Commands around the six stages, which `dvc repro` and `snakemake` run. `lora-dag COMMAND --help` shows the",
        "options. They act on the clone that the current folder belongs to. Paths on the command line are relative to",
        "the current folder, paths in params.yaml and `--set` to the root of the clone.",
    ]
    for group, rows in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12} {command.help}" for name, command in rows.items())]
    return "\n".join(lines)
