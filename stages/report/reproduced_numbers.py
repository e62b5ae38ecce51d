"""Compare metrics with the committed ones if settings, data and code are the same but the bytes differ.

On another kind of processor the last bits differ, and `git status` shows changed reports. A line on the terminal gives
the largest difference.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAMLError

from lora_dag.artifacts import lineage
from lora_dag.artifacts.metrics import is_number
from lora_dag.core.files import from_json
from lora_dag.pipeline import code
from lora_dag.pipeline.dvc_files import parse_lock
from lora_dag.pipeline.git import git
from stages.report.inputs import Inputs
from stages.report.last_commit import GIT_SECONDS, changed_inputs, committed

TOLERANCE = 1e-5
"""Share of the larger value. Metrics have six significant digits: the last digit is 1e-6 to 1e-5 of the value."""
ROUNDING = 1 + 1e-9  # 1.00001 is 1 + 1e-5 and a little more, as binary numbers
NOISE = "max_abs_error"  # of exports: rounding errors, which differ between processors in every digit
FILES = ("metrics.json", "dataset/metrics.json", "latents/metrics.json", "train/metrics.json", "export/metrics.json")
TABLE = "validate/heldout.csv"
OTHERS = ("samples.png", "progress.png", "dataset", "latents", "train", "export", "validate")
LOSS = "val.loss"
Numbers = dict[str, float]


def difference_line(inputs: Inputs, reports: Path) -> str:
    """Return a line on the largest difference from the committed metrics; empty if no byte or an input differs.

    Args:
        reports: folder of all reports; runs of a sweep have no committed reports.
    """
    paths = [(reports / name).as_posix() for name in (FILES[0], *OTHERS)]
    commit = git("rev-parse", "--short", "HEAD", timeout=GIT_SECONDS)
    if commit is None or not git("diff", "--name-only", "HEAD", "--", *paths, timeout=GIT_SECONDS):
        return ""
    try:
        if not (same_inputs(inputs, reports) and same_code()):
            return ""
        before = numbers({name: committed(reports / name) for name in (*FILES, TABLE)})
        after = numbers({name: (reports / name).read_bytes() for name in (*FILES, TABLE)})
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError, csv.Error):
        return ""  # not committed, or committed by a version with another format
    return compared(before, after, commit.decode().strip())


def same_inputs(inputs: Inputs, reports: Path) -> bool:
    """Return whether the committed reports have the same settings, images and base; packages may differ."""
    made, of_samples = (
        lineage.parse(committed(reports / name / "lineage.json") or b"") for name in ("export", "validate")
    )
    found = [
        change
        for change in changed_inputs(made, inputs.made, of_samples, inputs.lineage)
        if change != "packages changed"
    ]
    return not found and of_samples["dataset"] == inputs.lineage["dataset"]


def same_code() -> bool:
    """Return whether all code has the digests of the committed dvc.lock."""
    locked = parse_lock(committed(Path("dvc.lock")) or b"")
    stages = [stage for name, stage in locked.items() if name != "report"]
    digests = {path: dep["md5"] for stage in stages for path, dep in stage.deps.items() if code.is_code(path)}
    return all(code.dvc_md5(Path(path)) == digest for path, digest in digests.items())


def numbers(texts: dict[str, bytes | None]) -> Numbers:
    """Return all numbers of the metrics and all losses of the held-out table, by name."""
    found: Numbers = {}
    for name in FILES:
        found |= {
            key: float(value)
            for key, value in from_json(texts[name] or b"").items()
            if is_number(value) and not key.endswith(NOISE)
        }
    for row in csv.DictReader(io.StringIO((texts[TABLE] or b"").decode())):
        found |= {f"{TABLE} {row['row']} {model}": float(row[model]) for model in ("base", "adapter")}
    return found


def compared(before: Numbers, after: Numbers, commit: str) -> str:
    differences = dict(relative(before, after))
    name = max(differences, key=lambda name: differences[name])
    most = differences[name]
    if most <= TOLERANCE * ROUNDING:
        largest = f" (at most {most:.1e}, {name})" if most else ""
        return f"same        all metrics of commit {commit} up to {TOLERANCE:.0e}{largest}"
    measured = {each: share for each, share in differences.items() if not each.startswith(TABLE)}
    if (
        max(measured.values(), default=0.0) > TOLERANCE * ROUNDING
    ):  # single rows of the table differ more and matter less
        name = max(measured, key=lambda each: measured[each])
    loss = f"{LOSS} by {differences[LOSS]:.1e}, " if LOSS in differences and name != LOSS else ""
    cause = "Settings, data and code are the same: the processor, threads or packages differ."
    return f"differs     from commit {commit}: {loss}at most {name} by {differences[name]:.1e}. {cause}"


def relative(before: Numbers, after: Numbers) -> Iterator[tuple[str, float]]:
    """Yield the difference of each number as a share of the larger one; infinite if only one has it."""
    for name in sorted({*before, *after}):
        pair = before.get(name, math.nan), after.get(name, math.nan)
        if pair[0] == pair[1]:
            yield name, 0.0
        else:
            difference = abs(pair[0] - pair[1])
            yield name, math.inf if math.isnan(difference) else difference / max(map(abs, pair))
