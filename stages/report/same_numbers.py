"""A line for the terminal where equal settings, data and code gave other bytes than those that are committed.

On another kind of processor the last bits differ, and `git status` shows changed reports: the line says by how much.
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
from stages.report.last_commit import GIT_SECONDS, committed, compare

TOLERANCE = 1e-5
"""Of the larger of two values. Metrics have six significant digits: the last one is 1e-6 to 1e-5 of the value."""
ROUNDING = 1 + 1e-9  # 1.00001 is 1 + 1e-5 and a little more, as binary numbers
NOISE = "max_abs_error"  # of exports: rounding errors themselves, with no digit that two processors share
FILES = ("metrics.json", "dataset/metrics.json", "latents/metrics.json", "train/metrics.json", "export/metrics.json")
TABLE = "validate/heldout.csv"
OTHERS = ("samples.png", "progress.png", "dataset", "latents", "train", "export", "validate")
LOSS = "val.loss"
Numbers = dict[str, float]


def line(inputs: Inputs, reports: Path) -> str:
    """How near the numbers are to the committed ones; empty where no byte differs, or something else was made.

    Args:
        reports: the folder of all reports; of a run of a sweep nothing is committed.
    """
    shown = [(reports / name).as_posix() for name in (FILES[0], *OTHERS)]
    commit = git("rev-parse", "--short", "HEAD", timeout=GIT_SECONDS)
    if commit is None or not git("diff", "--name-only", "HEAD", "--", *shown, timeout=GIT_SECONDS):
        return ""
    try:
        if not (same_inputs(inputs, reports) and same_code()):
            return ""
        before = numbers({name: committed(reports / name) for name in (*FILES, TABLE)})
        after = numbers({name: (reports / name).read_bytes() for name in (*FILES, TABLE)})
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError, csv.Error):
        return ""  # not committed, or by a version that wrote it otherwise
    return compared(before, after, commit.decode().strip())


def same_inputs(inputs: Inputs, reports: Path) -> bool:
    """Whether the committed reports are of the same settings, pictures and base; packages may be others."""
    made, of_samples = (
        lineage.parse(committed(reports / name / "lineage.json") or b"") for name in ("export", "validate")
    )
    found = [what for what in compare(made, inputs.made, of_samples, inputs.lineage) if what != "other packages"]
    return not found and of_samples["dataset"] == inputs.lineage["dataset"]


def same_code() -> bool:
    """Whether the files and folders of code that the committed dvc.lock names have the digests that it names."""
    locked = parse_lock(committed(Path("dvc.lock")) or b"")
    stages = [stage for name, stage in locked.items() if name != "report"]
    digests = {path: dep["md5"] for stage in stages for path, dep in stage.deps.items() if code.is_code(path)}
    return all(code.dvc_md5(Path(path)) == digest for path, digest in digests.items())


def numbers(texts: dict[str, bytes | None]) -> Numbers:
    """Every number of the metrics, and every loss of the table, by name; digests and other words are left out."""
    found: Numbers = {}
    for name in FILES:
        found |= {
            key: float(value)
            for key, value in from_json(texts[name] or b"").items()
            if is_number(value) and not key.endswith(NOISE)
        }
    for row in csv.DictReader(io.StringIO((texts[TABLE] or b"").decode())):
        found |= {f"{TABLE} {row['row']} {side}": float(row[side]) for side in ("base", "adapter")}
    return found


def compared(before: Numbers, after: Numbers, commit: str) -> str:
    differences = dict(relative(before, after))
    name = max(differences, key=lambda name: differences[name])
    most = differences[name]
    if most <= TOLERANCE * ROUNDING:
        largest = f" (at most {most:.1e}, {name})" if most else ""
        return f"same        up to {TOLERANCE:.0e} of the metrics of commit {commit}{largest}; the last bits differ"
    measured = {each: share for each, share in differences.items() if not each.startswith(TABLE)}
    if max(measured.values(), default=0.0) > TOLERANCE * ROUNDING:  # single rows of the table differ more, and say less
        name = max(measured, key=lambda each: measured[each])
    loss = f"{LOSS} by {differences[LOSS]:.1e} of it, " if LOSS in differences and name != LOSS else ""
    why = "settings, data and code are the same, so the processor, threads or packages are others"
    return f"differs     from commit {commit}: {loss}{name} most, by {differences[name]:.1e} of it; {why}"


def relative(before: Numbers, after: Numbers) -> Iterator[tuple[str, float]]:
    """Difference of each number as a share of the larger one; infinite where only one side has it."""
    for name in sorted({*before, *after}):
        pair = before.get(name, math.nan), after.get(name, math.nan)
        if pair[0] == pair[1]:
            yield name, 0.0
        else:
            difference = abs(pair[0] - pair[1])
            yield name, math.inf if math.isnan(difference) else difference / max(map(abs, pair))
