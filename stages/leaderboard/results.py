"""What a run left below runs/: its reports, as `compare` takes them apart, or the reason why it has none.

A run counts as finished when all of its stages have written and what they recorded is what the plan asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts.metrics import Value
from stages.compare.sheets import cut_cells
from stages.compare.sides import DAMAGED, Side, parse_lineage, parse_metrics, parse_object, parse_scores
from stages.core.console import UserError
from stages.core.files import from_json
from stages.core.job_records import read_record
from stages.core.made_with import WITNESS, changed_code, changed_inputs, unsettled
from stages.core.sweep import Run

# Stage -> (what it writes last, its log), by the names of Run.folders and Run.places.
LAST = {
    "prepare": ("prepared", "dataset.json"),
    "cache_latents": ("latents", "manifest.json"),
    "train": ("adapter", "adapter.json"),
    "validate": ("reports", "metrics.json"),
    "export": ("export_reports", "lineage.json"),
    "report": ("reports", "report.md"),
}
RANKED = ("prepare", "cache_latents", "train", "validate", "export")  # what the figures come from
MAX_NAMED = 3
DIGEST_DIGITS = 12  # of the adapter, in reports/validate/lineage.json
LONGEST_REASON = 300  # characters


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


def read_result(run: Run, root: Path, known: dict[str, list[str]] | None = None) -> Result:
    """The reports of a run in a checkout at ``root``, or why there are none.

    Args:
        known: what ``outdated`` has found of folders that runs share.
    """
    missing = next((stage for stage, (at, name) in LAST.items() if not (root / run.folders[at] / name).is_file()), None)
    if missing:
        return Result(run, None, why_missing(run, missing, root))
    try:
        side, exported = read_side(run, root)
        cut_cells(side)
        other = list(other_than_planned(run, side, exported))
        other += [line for stage in RANKED for line in outdated(run, stage, {} if known is None else known)]
    except (OSError, UserError, *DAMAGED) as error:
        return Result(run, None, f"its reports are damaged ({error}); delete runs/{run.name} and run snakemake again")
    if other:
        return Result(run, None, f"not of the plan: {and_more(list(dict.fromkeys(other)))}; run snakemake again")
    return Result(run, side, seconds=training_seconds(run, side, root))


def read_side(run: Run, root: Path) -> tuple[Side, dict[str, Any]]:
    """The run as `compare` sees a revision, and its export's lineage."""
    reports, trained, exported = (root / run.folders[at] for at in ("reports", "train_reports", "export_reports"))
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
    return side, parse_object((exported / "lineage.json").read_bytes())


def other_than_planned(run: Run, side: Side, exported: dict[str, Any]) -> Iterator[str]:
    """What the reports say they were made with, where the plan says something else: of a run from before an edit."""
    recorded = {"lora": exported["lora"], "train": exported["train"], "validate": side.lineage["validate"]}
    for section, values in recorded.items():
        for key, value in values.items():
            if value != (asked := run.values[section].get(key)):
                yield f"{section}.{key} was {json.dumps(value)} and is {json.dumps(asked)}"
    if not exported["adapter"].startswith(side.lineage["adapter"][:DIGEST_DIGITS]):
        yield "its reports are of two trainings"


def outdated(run: Run, stage: str, known: dict[str, list[str]]) -> list[str]:
    """What the stage's job read or did otherwise than it would now; nothing where Snakemake has no record of it.

    Raises:
        UserError: the record is of another version of Snakemake.
    """
    folder, name = WITNESS[stage]
    path = f"{run.folders[folder]}/{name}"
    if path not in known:
        record = read_record(path)
        records = {stage: record} if record else {}
        checks = (unsettled, changed_code, changed_inputs)
        known[path] = [line for check in checks for line in check(records, run)] if records else []
    return known[path]


def and_more(lines: list[str]) -> str:
    """The first few: of another dataset, every picture is a line."""
    return ", ".join(lines[:MAX_NAMED]) + (f" and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else "")


def training_seconds(run: Run, side: Side, root: Path) -> float | None:
    """By the speed of the last command, so that one that went on from a checkpoint counts whole."""
    try:
        speed = from_json((root / run.folders["train_reports"] / "run.json").read_bytes())["images_per_second"]
        return side.metrics["train.images_seen"] / speed
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def why_missing(run: Run, stage: str, root: Path) -> str:
    """``train: error: ...``: the last error in the stage's log, else its last line."""
    place = run.places[stage]
    folder, name = (place, stage) if stage != "cache_latents" else place.rsplit("/", 1)
    log = root / "runs" / folder / "logs" / f"{name}.log"
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return f"{stage}: not run yet"
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith("error: ") or re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or said or ["its log is empty: killed, or just started"])[-1]
    return f"{stage}: {last}"[:LONGEST_REASON]
