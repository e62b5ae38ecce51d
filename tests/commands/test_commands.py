"""The table of commands: every row has its module, every module its row, and no help imports what takes seconds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest

from lora_dag import commands
from lora_dag.commands import COMMANDS
from tests.helpers.errors import refused
from tests.helpers.workspace import REPOSITORY

SLOW = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "pandas", "matplotlib", "dvc"}
FOLDER = REPOSITORY / "lora_dag/commands"


def test_every_command_module_has_a_row() -> None:
    files = {
        path.relative_to(FOLDER).with_suffix("").as_posix().replace("/", ".")
        for path in FOLDER.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "add_arguments"
    }
    assert files == {command.module for command in COMMANDS.values()}


HELP = """
import json, resource, sys
from lora_dag import commands
try:
    commands.parse(sys.argv[1:])
except SystemExit as ended:
    used = resource.getrusage(resource.RUSAGE_SELF)
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([ended.code, used.ru_utime + used.ru_stime, packages]))
"""


def help_of(*words: str) -> tuple[str, float, set[str]]:
    """The text, the processor's seconds, and the packages that were imported."""
    wide = os.environ | {"COLUMNS": "120"}
    argv = [sys.executable, "-c", HELP, *words, "--help"]
    done = subprocess.run(argv, cwd=REPOSITORY, env=wide, capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    code, seconds, modules = json.loads(last)
    assert code == 0 and done.stderr == ""
    return "\n".join(text), seconds, set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_fast(name: str) -> None:
    text, seconds, modules = help_of(name)
    assert text.startswith(f"usage: lora-dag {name} ") and "Run: " in text
    assert modules & SLOW == set() and seconds < 2


def test_the_help_of_all_imports_no_command_and_lists_each_with_its_line() -> None:
    text, seconds, modules = help_of()
    assert {"numpy", "pydantic", "PIL", "stages"} & modules == set() and seconds < 0.5
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ") and "--help" not in line]
    assert rows == [[name, command.help] for name, command in COMMANDS.items()]
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_command_the_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.parse([])
    assert ended.value.code == 2 and "before a run:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["chek", "--set", "lora.rank=4"], ("lora-dag chek: ", " check?")),
        (["--verbose", "gat"], ("lora-dag gat: ", " gate?")),
        (["train"], ("lora-dag train: ", "`dvc repro train`")),
        (["cache-latents"], ("lora-dag cache-latents: ", "`dvc repro cache_latents`")),
        (["x"], ("lora-dag x: ", ", ".join(COMMANDS))),
    ],
)
def test_unknown_command_gets_a_suggestion(words: list[str], values: tuple[str, str]) -> None:
    with refused("unknown-command", *values):
        commands.parse(words)
