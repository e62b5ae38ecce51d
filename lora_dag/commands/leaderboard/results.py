"""Results of the runs in runs/: the reports of finished runs, else the reason why a run is not finished.

A run is finished if all of its stages have written outputs with the planned settings, the current code and inputs. Runs
that Snakemake would rerun are not ranked.
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
from lora_dag.commands.compare.revision_report import (
    DAMAGED,
    RevisionReport,
    parse_lineage,
    parse_metrics,
    parse_scores,
)
from lora_dag.commands.compare.sheets import cut_cells
from lora_dag.core.console import UserError
from lora_dag.core.files import from_json
from lora_dag.pipeline.snakemake_records import read_record
from lora_dag.sweeps.grid import Run
from lora_dag.sweeps.stale import AGAIN, FINAL_OUTPUT, reasons_outdated

DIGEST_DIGITS = 12  # of the adapter, in reports/validate/lineage.json
LONGEST_REASON = 300  # characters
MOST_CHANGES = 3  # that a reason names


@dataclass(frozen=True)
class Result:
    """A planned run and its reports."""

    run: Run
    side: RevisionReport | None
    """None if the run is not finished."""
    reason: str = ""
    """Reason why the run is not finished."""
    seconds: float | None = None
    """Duration of the training; None if unknown."""

    @property
    def setting(self) -> str:
        """Name of the setting, equal for runs that differ only in train.seed."""
        return setting_of(self.run.name)

    @property
    def done(self) -> RevisionReport:
        """The reports of a finished run."""
        assert self.side is not None
        return self.side

    @property
    def seed(self) -> int:
        return self.run.value("train.seed")

    def number(self, name: str) -> float | None:
        """Return a metric; None if it is no number."""
        value = self.done.metrics.get(name)
        return float(value) if isinstance(value, int | float) else None


def setting_of(place: str) -> str:
    """Return ``raw/rank-16`` for ``raw/rank-16-s0``."""
    return re.sub(r"-s\d+$", "", place)


def read_results(runs: Sequence[Run]) -> list[Result]:
    """Return the result of each run in the current folder; files that runs share are checked once."""
    changes: dict[Path, list[str]] = {}
    return [read_result(run, changes) for run in runs]


def read_result(run: Run, changes: dict[Path, list[str]]) -> Result:
    files = {stage: Path(run.folders[at], name) for stage, (at, name) in FINAL_OUTPUT.items()}
    if missing := next((stage for stage, path in files.items() if not path.is_file()), None):
        return Result(run, None, why_missing(run, missing))
    try:
        for stage, path in files.items():
            changes[path] = changes[path] if path in changes else changes_since(stage, path, run)
        if found := list(dict.fromkeys(change for path in files.values() for change in changes[path])):
            return Result(run, None, f"{', '.join(found[:MOST_CHANGES])}. {AGAIN}")
        side, exported = read_revision(run)
        cut_cells(side)
        other = list(other_than_planned(run, side, exported))
    except (OSError, UserError, *DAMAGED) as error:
        return Result(run, None, f"damaged reports ({error}). Delete runs/{run.name} and run `snakemake` again.")
    if other:
        return Result(run, None, f"other settings than planned: {', '.join(other)}. Run `snakemake` again.")
    return Result(run, side, seconds=training_seconds(run, side))


def changes_since(stage: str, path: Path, run: Run) -> list[str]:
    """Return the changes since the job that wrote ``path``; none without Snakemake's record of the job."""
    record = read_record(path.as_posix())
    return list(reasons_outdated(stage, record, run)) if record else []


def read_revision(run: Run) -> tuple[RevisionReport, dict[str, Any]]:
    """Return the run's reports as `compare` reads a revision, and the provenance of its export."""
    reports, trained, exported = (Path(run.folders[at]) for at in ("reports", "train_reports", "export_reports"))
    metrics: dict[str, Value] = {}
    for folder in (reports, trained, exported):
        metrics |= parse_metrics((folder / "metrics.json").read_bytes())
    side = RevisionReport(
        name=run.name,
        commit=None,
        params={f"{section}.{key}": value for section, values in run.values.items() for key, value in values.items()},
        metrics=metrics,
        scores=parse_scores((reports / "validate/heldout.csv").read_bytes()),
        lineage=parse_lineage((reports / "validate/lineage.json").read_bytes()),
        samples=(reports / "samples.png").read_bytes(),
        images=None,
        lock=None,
    )
    return side, lineage.parse((exported / "lineage.json").read_bytes())


def other_than_planned(run: Run, side: RevisionReport, exported: dict[str, Any]) -> Iterator[str]:
    """Yield recorded settings that differ from the plan, as of a run from before an edit."""
    recorded = {"lora": exported["lora"], "train": exported["train"], "validate": side.lineage["validate"]}
    for section, values in recorded.items():
        for key, value in values.items():
            if value != (planned := run.values[section].get(key)):
                yield f"{section}.{key} was {json.dumps(value)} and is {json.dumps(planned)}"
    if not exported["adapter"].startswith(side.lineage["adapter"][:DIGEST_DIGITS]):
        yield "its reports belong to two trainings"


def training_seconds(run: Run, side: RevisionReport) -> float | None:
    """Return the duration by the speed of the last command, so that a resumed training counts as a whole."""
    try:
        speed = from_json(Path(run.folders["train_reports"], "run.json").read_bytes())["images_per_second"]
        return side.metrics["train.images_seen"] / speed
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def why_missing(run: Run, stage: str) -> str:
    """Return ``train: error: ...``: the last error in the stage's log, else its last line."""
    written = run.stage_folders[stage]
    folder, name = (written, stage) if stage != "cache_latents" else written.rsplit("/", 1)
    log = Path("runs", folder, "logs", f"{name}.log")
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return f"{stage}: not started"
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("error: ") or re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or lines or ["empty log: killed, or just started"])[-1]
    return f"{stage}: {last}"[:LONGEST_REASON]
