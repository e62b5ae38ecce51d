"""The report's rows of feature metrics: with a feature model, without one, with too few prompts for an interval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.report import feature_metrics


def summary(measured: dict[str, Any], model: str | None) -> str:
    lineage: dict[str, Any] = {"validate": {"prompts": ["a", "b", "c"]}, "table": {"num_images": {"heldout": 4}}}
    inputs: Any = SimpleNamespace(measured=measured, lineage=lineage | ({"feature_model": model} if model else {}))
    return feature_metrics.summary(inputs)


def test_summary_without_a_feature_model_is_a_note() -> None:
    assert summary({}, None).startswith("CLIP score, CMMD and KID were not measured") and "|" not in summary({}, None)


def test_each_metric_is_a_row_with_its_change_and_interval() -> None:
    ends = {"": 27.123, "_base": -25.5, "_change": 1.623, "_change_low": -0.25, "_change_high": 3.5}
    measured = {f"samples.{name}{end}": value for name in ("cosine", "cmmd") for end, value in ends.items()}
    text = summary(measured | {"samples.cmmd_change_low": None, "samples.cmmd_change_high": None}, "acme/clip@121212")
    lines = text.splitlines()
    assert lines[0] == "| Features of acme/clip@121212 | base | adapter | change |"
    minus = "\N{MINUS SIGN}"
    assert lines[2].endswith(f"| {minus}25.5 | 27.12 | +1.62 [{minus}0.25, +3.5] |") and "Cosine" in lines[2]
    assert lines[3].endswith(f"| {minus}25.5 | 27.12 | +1.62 |") and "CMMD" in lines[3]
    assert "3 prompts and 4 held-out images are few" in text and len(lines) == 8
