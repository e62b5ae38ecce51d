"""Measure the CPU seconds of each stage of the demo in a fresh clone, under two sets of instructions.

Run: ``python -m benchmarks.demo [--write]``; measures the last commit, not the workspace.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import readme

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("prepare", "cache_latents", "train", "validate", "export", "report")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Hides AVX-512 and bfloat16 units from PyTorch's own kernels and from oneDNN."""


@dataclass(frozen=True)
class Cost:
    cpu: float
    """Seconds of all processes that the command started."""
    wall: float
    """Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    sides = {capability(extra): measure(extra) for extra in ({}, AVX2)}
    text = table(sides)
    print(text)
    if args.write:
        readme.write("demo", text)


def capability(extra: dict[str, str]) -> str:
    """Return PyTorch's name of the instructions that it uses, such as AVX512."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | extra, capture_output=True, text=True)
    return done.stdout.strip()


def measure(extra: dict[str, str]) -> dict[str, Cost]:
    """Return stage -> cost of its `dvc repro`, in order, in a clone without any results.

    Args:
        extra: environment variables on top of this process's own.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "LORA_", "GIT_"))}
    environment = kept | extra | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        run(["git", "clone", "--quiet", f"file://{REPOSITORY}", str(clone)], Path(folder), environment)
        run(["dvc", "pull", "--quiet", "data/raw", "data/base"], clone, environment)
        return {stage: run(["dvc", "repro", stage], clone, environment) for stage in STAGES}


def run(words: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    """Run a command and return its cost.

    Raises:
        SystemExit: it failed; the message holds what it printed.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.monotonic() - began)


def table(sides: dict[str, dict[str, Cost]]) -> str:
    """Return Markdown with a row for each stage and one for their sum."""
    sums = {
        name: Cost(sum(c.cpu for c in side.values()), sum(c.wall for c in side.values()))
        for name, side in sides.items()
    }
    rows = [(f"`dvc repro {stage}`", [side[stage] for side in sides.values()]) for stage in STAGES]
    lines = [
        f"`python -m benchmarks.demo` on {readme.machine()}, {readme.versions('dvc', 'torch', 'diffusers')}:",
        "",
        "| | " + " | ".join(f"{name}: CPU seconds | wall seconds" for name in sides) + " |",
        "|---|" + "---:|---:|" * len(sides),
        *(f"| {what} | {cells(costs)} |" for what, costs in [*rows, ("all six", list(sums.values()))]),
    ]
    return "\n".join(lines) + "\n"


def cells(costs: list[Cost]) -> str:
    return " | ".join(f"{cost.cpu:.0f} | {cost.wall:.0f}" for cost in costs)


if __name__ == "__main__":
    main()
