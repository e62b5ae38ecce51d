"""Whether what started a training still waits for it: DVC, Snakemake, a shell."""

from __future__ import annotations

import os
from pathlib import Path


def parent_pids() -> list[int]:
    """Process ids from the parent upwards; the parent alone where there is no /proc.

    They change when one of them dies: between Snakemake and a training stands a shell, which outlives Snakemake.
    """
    found = [os.getppid()]
    while found[-1] > 1:
        try:
            status = Path(f"/proc/{found[-1]}/stat").read_text()
        except OSError:
            break
        found.append(int(status.rpartition(")")[2].split()[1]))  # the name in brackets may hold anything
    return found
