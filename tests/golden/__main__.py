"""Compare the golden runs with what is recorded, or record them anew.

Run: ``python -m tests.golden [STAGE ...]`` lists every value that moved;
``python -m tests.golden --write [STAGE ...]`` records new runs, and the values of stages whose number ``RESULTS`` in
stages/STAGE/__init__.py was raised. It refuses moved values without a new number, and a number without moved values.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_dag.core.params import FAMILIES
from tests.golden import inputs, record
from tests.golden.measures import measure
from tests.golden.runs import RUNS
from tests.helpers.workspace import run_stage


def run(stage: str, name: str, folder: Path, bases: dict[str, Path]) -> dict[str, Any]:
    """The values of a run, made in an empty folder."""
    settings = RUNS[stage][name]
    with inputs.workspace(folder, settings, bases) as overrides:
        inputs.make(stage, settings, overrides)
        run_stage(stage, *(word for override in overrides for word in ("--set", override)))
        return measure(stage)


def measure_all(stage: str, bases: dict[str, Path]) -> dict[str, Any]:
    found = {}
    for name in RUNS[stage]:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(stage, name, Path(folder), bases)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(RUNS)}; all without it")
    parser.add_argument("--write", action="store_true", help="record the values")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(RUNS):
        parser.error(f"{', '.join(sorted(unknown))}: no stage; the stages are {', '.join(RUNS)}")
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bases = inputs.save_bases(Path(folder), set(FAMILIES))
        for stage in args.stages or RUNS:
            new, problems = record.renewed(stage, record.read(stage), measure_all(stage, bases))
            found += problems
            if args.write and not problems:
                record.write(stage, new)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
