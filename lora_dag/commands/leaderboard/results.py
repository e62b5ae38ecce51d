"""What a run left below runs/: its reports, as `compare` takes them apart, or the reason why it has none.

A run counts as finished when all of its stages have written and what they recorded is what the plan asks for, of
today's code and inputs: after a failure, what Snakemake would still make again is not ranked beside what it made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dag.artifacts import lineage
from lora_dag.artifacts.metrics import Value
from lora_dag.commands.compare.sheets import cut_cells
from lora_dag.commands.compare.sides import DAMAGED, Side, parse_lineage, parse_metrics, parse_scores
from lora_dag.core.console import UserError
from lora_dag.core.files import from_json
from lora_dag.pipeline.snakemake_records import read_record
from lora_dag.sweeps.grid import Run
from lora_dag.sweeps.stale import AGAIN, WITNESS, outdated

DIGEST_DIGITS = 12  # of the adapter, in reports/validate/lineage.json
LONGEST_REASON = 300  # characters
MOST_CHANGES = 3  # that a reason names


@dataclass(frozen=True)
class Result:
    """A run of the plan and what came of it."""

    run: Run
    side: Side | None
    """None where it is not finished."""
    reason: str = ""
    """Why it is not finished."""
    seconds: float | None = None
    """Of the training on the machine that did it; None where nothing says so."""

    @property
    def setting(self) -> str:
        """The same for runs that differ in train.seed alone."""
        return setting_of(self.run.name)

    @property
    def done(self) -> Side:
        """The reports of a finished run."""
        assert self.side is not None
        return self.side

    @property
    def seed(self) -> int:
        return self.run.value("train.seed")

    def number(self, name: str) -> float | None:
        """A metric, where it is one."""
        value = self.done.metrics.get(name)
        return float(value) if isinstance(value, int | float) else None


def setting_of(place: str) -> str:
    """``raw/rank-16`` of ``raw/rank-16-s0``."""
    return re.sub(r"-s\d+$", "", place)


def read_results(runs: Sequence[Run]) -> list[Result]:
    """The reports of each run, below the current folder, or why it has none; what runs share is looked at once."""
    changes: dict[Path, list[str]] = {}
    return [read_result(run, changes) for run in runs]


def read_result(run: Run, changes: dict[Path, list[str]]) -> Result:
    files = {stage: Path(run.folders[at], name) for stage, (at, name) in WITNESS.items()}
    if missing := next((stage for stage, path in files.items() if not path.is_file()), None):
        return Result(run, None, why_missing(run, missing))
    try:
        for stage, path in files.items():
            changes[path] = changes[path] if path in changes else changes_since(stage, path, run)
        if found := list(dict.fromkeys(change for path in files.values() for change in changes[path])):
            return Result(run, None, f"{', '.join(found[:MOST_CHANGES])}; {AGAIN}")
        side, exported = read_side(run)
        cut_cells(side)
        other = list(other_than_planned(run, side, exported))
    except (OSError, UserError, *DAMAGED) as error:
        return Result(run, None, f"its reports are damaged ({error}); delete runs/{run.name} and run snakemake again")
    if other:
        return Result(run, None, f"not of the plan: {', '.join(other)}; run snakemake again")
    return Result(run, side, seconds=training_seconds(run, side))


def changes_since(stage: str, path: Path, run: Run) -> list[str]:
    """Since the job that wrote ``path``; nothing where Snakemake's record of it is gone."""
    record = read_record(path.as_posix())
    return list(outdated(stage, record, run)) if record else []


def read_side(run: Run) -> tuple[Side, dict[str, Any]]:
    """The run as `compare` sees a revision, and its export's lineage."""
    reports, trained, exported = (Path(run.folders[at]) for at in ("reports", "train_reports", "export_reports"))
    metrics: dict[str, Value] = {}
    for folder in (reports, trained, exported):
        metrics |= parse_metrics((folder / "metrics.json").read_bytes())
    side = Side(
        name=run.name,
        commit=None,
        params={f"{section}.{key}": value for section, values in run.values.items() for key, value in values.items()},
        metrics=metrics,
        scores=parse_scores((reports / "validate/heldout.csv").read_bytes()),
        lineage=parse_lineage((reports / "validate/lineage.json").read_bytes()),
        samples=(reports / "samples.png").read_bytes(),
        pictures=None,
        lock=None,
    )
    return side, lineage.parse((exported / "lineage.json").read_bytes())


def other_than_planned(run: Run, side: Side, exported: dict[str, Any]) -> Iterator[str]:
    """What the reports say they were made with, where the plan says something else: of a run from before an edit."""
    recorded = {"lora": exported["lora"], "train": exported["train"], "validate": side.lineage["validate"]}
    for section, values in recorded.items():
        for key, value in values.items():
            if value != (asked := run.values[section].get(key)):
                yield f"{section}.{key} was {json.dumps(value)} and is {json.dumps(asked)}"
    if not exported["adapter"].startswith(side.lineage["adapter"][:DIGEST_DIGITS]):
        yield "its reports are of two trainings"


def training_seconds(run: Run, side: Side) -> float | None:
    """By the speed of the last command, so that one that went on from a checkpoint counts whole."""
    try:
        speed = from_json(Path(run.folders["train_reports"], "run.json").read_bytes())["images_per_second"]
        return side.metrics["train.images_seen"] / speed
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def why_missing(run: Run, stage: str) -> str:
    """``train: error: ...``: the last error in the stage's log, else its last line."""
    place = run.places[stage]
    folder, name = (place, stage) if stage != "cache_latents" else place.rsplit("/", 1)
    log = Path("runs", folder, "logs", f"{name}.log")
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return f"{stage}: not run yet"
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith("error: ") or re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or said or ["its log is empty: killed, or just started"])[-1]
    return f"{stage}: {last}"[:LONGEST_REASON]
