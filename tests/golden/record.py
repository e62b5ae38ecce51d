"""tests/golden/STAGE.json: the values of a stage's runs, and the number ``RESULTS`` that they belong to.

``{"RESULTS": {"1": digest, "2": digest}, "runs": {run: values}}``: one digest of the values for each number so far, the
last of them today's. Where two branches both made number 2, their digests are a conflict for git, as the results are.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RELATIVE = 2e-4
"""A number has moved where it differs by more. AVX2 and AVX-512 differ by 8e-5, one thread and two by 5e-5."""
DIFFERENCE = re.compile(r"change|gap|minus|curve|mix$|grid")
ABSOLUTE = 1e-4
"""The same for numbers that may be near zero: differences, and tiles of sheets. Those instructions differ by 2.5e-5."""


def path_of(stage: str) -> Path:
    return FOLDER / f"{stage}.json"


def number_of(stage: str) -> int:
    """``RESULTS`` of stages/STAGE/__init__.py."""
    number: int = importlib.import_module(f"stages.{stage}").RESULTS
    return number


def read(stage: str) -> dict[str, Any]:
    """The recorded values; none before the first writing."""
    if not path_of(stage).exists():
        return {"RESULTS": {}, "runs": {}}
    record: dict[str, Any] = json.loads(path_of(stage).read_text(encoding="utf-8"))
    return record


def flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``("adapter norm", 1.5)``"""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        yield name, values
    else:
        for key, value in pairs:
            yield from flat(value, f"{name} {key}".strip())


def moved(recorded: Any, measured: Any) -> list[str]:
    """A line for each value that is another: ``adapter norm: 1.5, recorded 1.4``."""
    before, now = dict(flat(recorded)), dict(flat(measured))
    return [
        f"{name}: {now.get(name, 'none')}, recorded {before.get(name, 'none')}"
        for name in {**before, **now}
        if name not in before or name not in now or not same(name, before[name], now[name])
    ]


def same(name: str, recorded: Any, measured: Any) -> bool:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (recorded, measured)):
        return bool(recorded == measured)
    return math.isclose(recorded, measured, rel_tol=RELATIVE, abs_tol=ABSOLUTE if DIFFERENCE.search(name) else 1e-12)


def number_problem(stage: str, record: dict[str, Any]) -> str | None:
    """Why the record's numbers are not those of the code."""
    numbers, today = record["RESULTS"], number_of(stage)
    name = f"tests/golden/{stage}.json"
    if list(numbers) != [str(number) for number in range(1, len(numbers) + 1)]:
        return f"{name}: RESULTS has {', '.join(numbers)}; the numbers count from 1 without a gap"
    if len(set(numbers.values())) < len(numbers):
        return f"{name}: two numbers of RESULTS have the same values; a new number needs a value that moved"
    if numbers and list(numbers.values())[-1] != digest(record["runs"]):
        return f"{name}: the values are not number {len(numbers)}'s; `python -m tests.golden --write` writes it"
    if len(numbers) != today:
        found = f"stages/{stage}/__init__.py has RESULTS = {today}, {name} has {len(numbers)}"
        return f"{found}; run `python -m tests.golden --write`, which needs a value that moved"
    return None


def renewed(stage: str, record: dict[str, Any], measured: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record with today's number and values, and why it cannot be written; runs may come and go freely.

    Values that have not moved stay as they are recorded, so that another machine's last digits are no change.
    """
    today, last = number_of(stage), len(record["RESULTS"])
    both = [run for run in measured if run in record["runs"]]
    changed = {run: moved(record["runs"][run], measured[run]) for run in both}
    lines = [f"{stage} {run}: {line}" for run in both for line in changed[run]]
    if today not in (last, last + 1):
        return record, [f"stages/{stage}/__init__.py: RESULTS is {today}; after {last} comes {last + 1}"]
    if today == last and lines:
        cure = f"set RESULTS = {last + 1} in stages/{stage}/__init__.py if the new values are right"
        return record, [*lines, f"{stage}: values moved and RESULTS is {last} as before; {cure}"]
    if last and today > last and not lines:
        cure = f"set it back to {last}, or first record a run that shows the change (tests/golden/runs.py)"
        return record, [f"stages/{stage}/__init__.py: RESULTS is {today} and no value moved since {last}; {cure}"]
    runs = {run: record["runs"][run] if run in both and not changed[run] else measured[run] for run in measured}
    runs = rounded(runs)
    return {"RESULTS": record["RESULTS"] | {str(today): digest(runs)}, "runs": runs}, []


def rounded(values: Any) -> Any:
    """Seven digits: more than the tolerance, and the same text on most machines."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.7g}") if isinstance(values, float) else values


def digest(runs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:16]


def write(stage: str, record: dict[str, Any]) -> None:
    path_of(stage).write_text(layout(record) + "\n", encoding="utf-8")


def layout(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one, so that a diff shows a moved value beside its name."""
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or (indent and len(indent) + len(short) <= 110):
        return short
    inside = indent + "  "
    pairs = value.items() if isinstance(value, dict) else [(None, item) for item in value]
    lines = [
        inside + ("" if key is None else f"{json.dumps(key, ensure_ascii=False)}: ") + layout(item, inside)
        for key, item in pairs
    ]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([first, ",\n".join(lines), indent + last]) if lines else short
