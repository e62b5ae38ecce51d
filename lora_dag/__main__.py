"""``lora-dag COMMAND``, or ``python -m lora_dag COMMAND`` in the root of a clone.

It works on the clone of the current folder, with the code of that clone, whichever clone is installed.
Paths on the command line are relative to the current folder; the command itself works in the root.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from lora_dag import commands
from lora_dag.commands import completion
from lora_dag.core import clone, console
from lora_dag.core.console import Problem, UserError


def main() -> None:
    """Entry point in pyproject.toml."""
    console.handle_interrupts()
    root = clone.find(Path.cwd())
    if root is None or (root / "lora_dag").samefile(Path(__file__).parent):
        console.run(lambda: start(root))
    else:
        run_code_of(root)


def run_code_of(root: Path) -> None:
    """Run the command with the code of another clone than the installed one."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lora_dag", "stages"):
            del sys.modules[name]
    sys.path.insert(0, str(root))
    runpy.run_module("lora_dag", run_name="__main__", alter_sys=True)


def start(root: Path | None) -> None:
    """Parse the command line in the current folder, then run the command in the root.

    Raises:
        UserError: the folder is outside of a clone, or the command is unknown.
    """
    if root is None and sys.argv[1:] not in (["-h"], ["--help"]):
        text = f"{Path.cwd()}: not in a clone of lora-dag (a folder with {', '.join(clone.MARKS)})."
        raise UserError(Problem("outside-clone", f"{text} Change into a clone."))
    if "_ARGCOMPLETE" in os.environ:  # a shell completes a command line
        completion.complete(os.environ["COMP_LINE"])
    args = commands.parse(sys.argv[1:])
    if root is not None and root != Path.cwd():
        print(f"clone       {root}", file=sys.stderr)
        os.chdir(root)
    args.main(args)


if __name__ == "__main__":
    main()
