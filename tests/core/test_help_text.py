"""Help fits the terminal, and its items stay items."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_dag.commands import COMMANDS
from lora_dag.core import help_text
from lora_dag.core.stage_start import STAGES
from tests.helpers.workspace import REPOSITORY

TEXT = """\
Rank the runs of a sweep, by their held-out loss and
by their cost.

In: params.yaml and runs/.
Out: a page.
"""


def test_paragraphs_join_and_items_stay() -> None:
    assert help_text.split_items(TEXT) == [
        "Rank the runs of a sweep, by their held-out loss and by their cost.",
        "",
        "In: params.yaml and runs/.",
        "Out: a page.",
    ]


def test_later_lines_of_an_item_begin_under_its_text() -> None:
    assert help_text.wrap("  check        check the images", 24, "") == (
        "  check        check the\n               images"
    )
    assert help_text.wrap("In: one two three", 11, "") == "In: one two\n    three"


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [["-m", "lora_dag"], *(["-m", "lora_dag", name] for name in COMMANDS), *(["-m", f"stages.{s}"] for s in STAGES)],
    ids=lambda command: command[-1],
)
def test_help_fits_80_columns(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        env=os.environ | {"COLUMNS": "80"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
