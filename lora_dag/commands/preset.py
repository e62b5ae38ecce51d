"""Write the settings for a model on a GPU of some size into params.yaml.

In: presets/NAME.yaml, a part of params.yaml. Out: params.yaml; comments and all other settings stay as they are.
Run: ``lora-dag preset NAME --set model.pretrained=data/flux``; without NAME it lists the presets
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from lora_dag.core import params
from lora_dag.core.console import Problem, UserError, add_settings, log
from lora_dag.core.files import write_text
from lora_dag.pipeline.yaml_edit import to_yaml, value_in, with_values

FOLDER = Path(__file__).parents[2] / "presets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a file of presets/, without .yaml")
    add_settings(parser)


def main(args: argparse.Namespace) -> None:
    if args.name is None:
        for path in sorted(FOLDER.glob("*.yaml")):
            log.info("%-20s %s", path.stem, about(path))
        return
    tree = params.read_yaml(args.params)
    wanted = settings(args.name)
    for key, value in wanted.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    for override in args.overrides:
        params.apply_override(tree, override)
        key = override.partition("=")[0]
        section, _, name = key.partition(".")
        wanted[key] = tree[section][name]
    params.check(tree, params.Origin(args.params, args.overrides))
    before = params.read_yaml(args.params)
    changed = {key: value for key, value in wanted.items() if value_in(before, key) != value}
    write_text(args.params, with_values(args.params.read_text(encoding="utf-8"), changed))
    for key, value in changed.items():
        log.info("%s: %s -> %s", key, to_yaml(value_in(before, key)), to_yaml(value))
    log.info("next        lora-dag check")


def settings(name: str) -> dict[str, Any]:
    """Return the settings of a preset: ``section.key`` -> value.

    Raises:
        UserError: there is no such preset.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in FOLDER.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise UserError(
            Problem("preset-missing", f"presets/{path.name}: no such file. Did you mean {' or '.join(near)}?")
        )
    tree = params.read_yaml(path)
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}


def about(path: Path) -> str:
    """Return the comment in the first line of a preset."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
