"""The gates of section ``report.gates``, held against the figures in reports/."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lora_dag.artifacts.metrics import Value
from lora_dag.commands.gate.against import Comparison
from lora_dag.pages.markdown import signed
from stages.report.params import Gates

WITH_INTERVAL = {"max_overfit_gap": "val.overfit_gap", "max_drift_change": "drift.loss_change"}
COPIED = "samples.copied_share"
EXPORTED = re.compile(r"export\.(?!rank_)\w+\.max_abs_error")


@dataclass(frozen=True)
class Answer:
    """What one gate says."""

    gate: str
    limit: float
    measured: str
    passed: bool
    neutral: bool = False
    """It passed without a measurement, as ``when_not_comparable`` allows."""
    cure: str = ""
    """A setting that would let it pass."""

    def __str__(self) -> str:
        return f"report.gates.{self.gate}: {self.measured}; the limit is {self.limit:g}{self.cure}"

    @property
    def word(self) -> str:
        return "**not passed**" if not self.passed else "neutral" if self.neutral else "passed"


def answers(gates: Gates, metrics: Mapping[str, Value], comparison: Comparison | None) -> list[Answer]:
    """One per gate that is set. A figure that is missing closes its gate.

    Args:
        metrics: of reports/**/metrics.json together.
        comparison: None where no revision was given, which leaves ``max_heldout_change`` out.
    """
    found = []
    if gates.max_heldout_change is not None and comparison:
        found.append(ask_change(gates, gates.max_heldout_change, comparison))
    for gate, name in WITH_INTERVAL.items():
        limit = getattr(gates, gate)
        if limit is not None:
            found.append(ask(gate, limit, {name: metrics.get(f"{name}_low")}, f"lower bound of {name}"))
    if gates.max_copied_share is not None:
        found.append(ask("max_copied_share", gates.max_copied_share, {COPIED: metrics.get(COPIED)}, COPIED))
    if gates.max_export_error is not None:
        errors = {name: value for name, value in metrics.items() if EXPORTED.fullmatch(name)}
        found.append(ask("max_export_error", gates.max_export_error, errors, "export.*.max_abs_error"))
    return found


def ask(gate: str, limit: float, values: Mapping[str, Value], what: str) -> Answer:
    """The largest of ``values`` against ``limit``; closed where one is no number, or there is none."""
    numbers = {name: number for name, value in values.items() if (number := as_number(value)) is not None}
    if not numbers or len(numbers) < len(values):
        lacking = sorted(values.keys() - numbers.keys()) or [what]
        return Answer(gate, limit, f"{', '.join(lacking)} was not measured", passed=False)
    worst = max(numbers, key=lambda name: numbers[name])
    name = what if worst in what else worst
    return Answer(gate, limit, f"{name} is {numbers[worst]:z.4g}", passed=numbers[worst] <= limit)


def as_number(value: Value) -> float | None:
    """None for NaN too, which no limit is below."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def ask_change(gates: Gates, limit: float, comparison: Comparison) -> Answer:
    """Closed where the whole interval lies above ``limit``, or there is none; undecided where a setting says so."""
    gate, change = "max_heldout_change", comparison.change
    if isinstance(change, str):
        if not comparison.nothing_common:
            return Answer(gate, limit, change, passed=False)
        if gates.when_not_comparable == "neutral":
            return Answer(gate, limit, change, passed=True, neutral=True)
        return Answer(gate, limit, change, passed=False, cure="; report.gates.when_not_comparable=neutral lets it pass")
    if change.low != change.low:
        return Answer(gate, limit, "one held-out picture has no interval", passed=False)
    mean, low, high = (signed(100 * share, ".2f") for share in (change.mean, change.low, change.high))
    over = f" over {comparison.shared}" if comparison.shared else ""
    return Answer(gate, limit, f"held-out loss {mean} % [{low}, {high}]{over}", passed=change.low <= limit)
