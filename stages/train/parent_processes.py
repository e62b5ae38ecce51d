"""Parent processes of a training: DVC, Snakemake, a shell. They show whether its caller still waits for it."""

from __future__ import annotations

import os
from pathlib import Path


def parent_pids() -> list[int]:
    """Return the process ids of the parent and its ancestors; only the parent without /proc.

    They change when an ancestor dies. The parent alone is not enough: the shell between Snakemake and a training
    outlives Snakemake.
    """
    pids = [os.getppid()]
    while pids[-1] > 1:
        try:
            status = Path(f"/proc/{pids[-1]}/stat").read_text()
        except OSError:
            break
        pids.append(int(status.rpartition(")")[2].split()[1]))  # the name in brackets may contain any character
    return pids
