"""The gates of section ``report.gates``, held against the figures in reports/."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lora_dag.artifacts.metrics import Value
from lora_dag.commands.gate.against import Comparison
from lora_dag.evaluation.metrics import METRICS, Metric, key_of
from lora_dag.pages.markdown import signed
from stages.report.params import Gates


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
    is_least: bool = False
    """Higher is better."""

    def __str__(self) -> str:
        return f"report.gates.{self.gate}: {self.measured}; the limit is {self.shown_limit}{self.cure}"

    @property
    def shown_limit(self) -> str:
        return f"at least {self.limit:g}" if self.is_least else f"{self.limit:g}"

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
    return found + [ask(name, limit, metrics) for name, limit in gates.limits.items()]


def ask(name: str, limit: float, metrics: Mapping[str, Value]) -> Answer:
    """The worst figure of a metric against its limit; closed where one is no number, or there is none.

    Args:
        name: of a metric; ``export.*.max_abs_error`` is of every format.
    """
    metric = METRICS[key_of(name) or name]
    is_least = metric.better == "higher"
    names = [each for each in metrics if key_of(each) == name] if "*" in name else [name]
    bound = ("high" if is_least else "low") if has_interval(name, metric) else ""
    values = {each: as_number(metrics.get(f"{each}_{bound}" if bound else each)) for each in names}
    numbers = {each: number for each, number in values.items() if number is not None}
    if not numbers or len(numbers) < len(values):
        lacking = sorted(values.keys() - numbers.keys()) or [name]
        return Answer("limits", limit, f"{', '.join(lacking)} was not measured", passed=False, is_least=is_least)
    worst = (min if is_least else max)(numbers, key=lambda each: numbers[each])
    passed = numbers[worst] >= limit if is_least else numbers[worst] <= limit
    what = {"": "", "low": "lower bound of ", "high": "upper bound of "}[bound] + worst
    return Answer("limits", limit, f"{what} is {numbers[worst]:z.4g}", passed=passed, is_least=is_least)


def has_interval(name: str, metric: Metric) -> bool:
    """Of a metric that the base has as well, the change alone has one."""
    return metric.has_interval and (not metric.has_base or name.endswith("_change"))


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
