"""Compare the metrics of reports/ with the limits of section ``report.gates``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lora_dag.artifacts.metrics import Value
from lora_dag.commands.gate.comparison import Comparison
from lora_dag.core.console import Problem
from lora_dag.evaluation.metrics import METRICS, Metric, key_of
from lora_dag.pages.markdown import signed
from stages.report.params import Gates


@dataclass(frozen=True)
class GateResult:
    """Result of one gate."""

    gate: str
    limit: float
    measured: str
    passed: bool
    neutral: bool = False
    """Whether the gate passed without a measurement, as ``when_not_comparable`` allows."""
    hint: str = ""
    """A setting that would let the gate pass."""
    is_least: bool = False
    """Whether the limit is the lowest value that passes."""

    @property
    def problem(self) -> Problem:
        text = f"report.gates.{self.gate}: {self.measured}, but the limit is {self.limit_text}.{self.hint}"
        return Problem("gate-failed", text)

    @property
    def limit_text(self) -> str:
        return f"at least {self.limit:g}" if self.is_least else f"{self.limit:g}"

    @property
    def word(self) -> str:
        return "**failed**" if not self.passed else "neutral" if self.neutral else "passed"


def check_limits(gates: Gates, metrics: Mapping[str, Value], comparison: Comparison | None) -> list[GateResult]:
    """Return one result per gate that is set. A missing metric fails its gate.

    Args:
        metrics: all of reports/**/metrics.json.
        comparison: None if no revision was given; ``max_heldout_change`` is skipped then.
    """
    found = []
    if gates.max_heldout_change is not None and comparison:
        found.append(check_heldout_change(gates, gates.max_heldout_change, comparison))
    return found + [check_limit(name, limit, metrics) for name, limit in gates.limits.items()]


def check_limit(name: str, limit: float, metrics: Mapping[str, Value]) -> GateResult:
    """Compare the worst value of a metric with its limit. A missing value, or one that is not a number, fails.

    Args:
        name: name of a metric; ``export.*.max_abs_error`` covers every format.
    """
    metric = METRICS[key_of(name) or name]
    is_least = metric.better == "higher"
    names = [each for each in metrics if key_of(each) == name] if "*" in name else [name]
    bound = ("high" if is_least else "low") if has_interval(name, metric) else ""
    values = {each: as_number(metrics.get(f"{each}_{bound}" if bound else each)) for each in names}
    numbers = {each: number for each, number in values.items() if number is not None}
    if not numbers or len(numbers) < len(values):
        missing = sorted(values.keys() - numbers.keys()) or [name]
        return GateResult("limits", limit, f"{', '.join(missing)} was not measured", passed=False, is_least=is_least)
    worst = (min if is_least else max)(numbers, key=lambda each: numbers[each])
    passed = numbers[worst] >= limit if is_least else numbers[worst] <= limit
    label = {"": "", "low": "lower bound of ", "high": "upper bound of "}[bound] + worst
    return GateResult("limits", limit, f"{label} is {numbers[worst]:z.4g}", passed=passed, is_least=is_least)


def has_interval(name: str, metric: Metric) -> bool:
    """Return whether a metric has an interval. If the base has the metric too, only its change has one."""
    return metric.has_interval and (not metric.has_base or name.endswith("_change"))


def as_number(value: Value) -> float | None:
    """Return the value as a number; None for NaN, because it is not above any limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def check_heldout_change(gates: Gates, limit: float, comparison: Comparison) -> GateResult:
    """Fail if the whole interval lies above ``limit``, or if there is none; ``when_not_comparable`` can allow that."""
    gate, change = "max_heldout_change", comparison.change
    if isinstance(change, str):
        if not comparison.nothing_common:
            return GateResult(gate, limit, change, passed=False)
        if gates.when_not_comparable == "neutral":
            return GateResult(gate, limit, change, passed=True, neutral=True)
        return GateResult(
            gate, limit, change, passed=False, hint=" Set report.gates.when_not_comparable=neutral to let it pass."
        )
    if change.low != change.low:
        return GateResult(gate, limit, "one held-out image gives no interval", passed=False)
    mean, low, high = (signed(100 * share, ".2f") for share in (change.mean, change.low, change.high))
    over = f" over {comparison.shared}" if comparison.shared else ""
    return GateResult(gate, limit, f"held-out loss {mean} % [{low}, {high}]{over}", passed=change.low <= limit)
