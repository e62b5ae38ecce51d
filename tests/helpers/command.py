"""A command of ``lora-dag`` in a folder that is no clone, as a workspace of the tests is none.

Run: ``python -m tests.helpers.command check --help``
"""

from __future__ import annotations

import sys

from lora_dag.commands import parse
from lora_dag.core import console


def run(*argv: str) -> None:
    args = parse([*argv])
    args.main(args)


if __name__ == "__main__":
    console.run(lambda: run(*sys.argv[1:]))
